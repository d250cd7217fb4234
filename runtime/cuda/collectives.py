"""Steps in which ranks hand values to each other, and numbers that they must agree on."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from runtime.cuda.communicator import Communicator
from runtime.cuda.driver import Device
from runtime.cuda.steps import Call, Enqueue
from runtime.executable import Array
from runtime.program import BYTES, Port, Program, Step

GATHERED = 64 << 20  # bytes that are gathered at a time, where rows must be put together afterwards


def collective_step(program: Program, step: Step, group: Communicator, device: Device, scratch: int) -> Enqueue:
    """`all_reduce`, or `all_gather` on the last axis, by way of `scratch` bytes that `gather_bytes` counts."""
    ((_, source),), ((_, target),) = step.inputs.items(), step.outputs.items()
    port = program.types[source]
    if step.name == "all_reduce":

        def reduce(call: Call) -> None:
            rows, width = _rows(port, call.dims)
            group.all_reduce(call.addresses[source], call.addresses[target], rows * width, port.dtype)

        return reduce
    if step.name != "all_gather" or step.attrs["axis"] not in (-1, len(port.shape) - 1):
        raise AssertionError(f"collective `{step.name}` with {dict(step.attrs)}")

    def gather(call: Call) -> None:
        rows, width = _rows(port, call.dims)
        begin, end, size = call.addresses[source], call.addresses[target], width * BYTES[port.dtype]
        if rows == 1:  # the ranks' columns in the order of ranks: they lie as they come
            group.all_gather(begin, end, width, port.dtype)
            return
        most = _at_once(size * group.size)
        for first in range(0, rows, most):
            count = min(most, rows - first)
            group.all_gather(begin + first * size, scratch, count * width, port.dtype)
            for rank in range(group.size):
                place = end + first * size * group.size + rank * size
                device.copy_rows(place, size * group.size, scratch + rank * count * size, size, count)

    return gather


def gather_bytes(program: Program, size: int, dims: Mapping[str, int]) -> int:
    """Bytes that the gathers of a plan over `size` ranks put together in, where the named dims have these sizes."""
    found = 0
    for step in program.steps:
        if step.kind == "collective" and step.name == "all_gather":
            for value in step.inputs.values():
                rows, width = _rows(program.types[value], dims)
                whole = width * size * BYTES[program.types[value].dtype]
                found = max(found, whole * min(rows, _at_once(whole)))
    return found


def _at_once(row: int) -> int:
    """Rows of so many bytes that are gathered at a time."""
    return max(1, GATHERED // row)


def _rows(port: Port, dims: Mapping[str, int]) -> tuple[int, int]:
    sizes = [dim if isinstance(dim, int) else dims[dim] for dim in port.shape]
    return prod(sizes[:-1]), sizes[-1]


class Agreement:
    """Numbers that each rank measures for itself and all must take alike: what they do follows from them."""

    def __init__(self, group: Communicator, device: Device) -> None:
        """Over all ranks of a communicator."""
        self._group, self._device = group, device
        self._address = device.allocate(256)

    def least(self, number: int) -> int:
        """The least of all ranks' numbers."""
        found = np.array([number], np.int32)
        self._reduce(found, "i32", "min")
        return int(found[0])

    def total(self, times: Mapping[str, float]) -> dict[str, float]:
        """Sums over the ranks, by name."""
        found = np.array(list(times.values()), np.float32)
        self._reduce(found, "f32", "sum")
        return dict(zip(times, found.tolist(), strict=True))

    def _reduce(self, numbers: Array, dtype: str, how: str) -> None:
        self._device.upload(self._address, numbers)
        self._group.all_reduce(self._address, self._address, numbers.size, dtype, how)
        self._device.wait()
        self._device.download(numbers, self._address)
        self._device.wait()
