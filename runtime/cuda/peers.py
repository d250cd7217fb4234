"""Sums over ranks in one launch, where kernels reach the other GPUs' memory (compiler/kernels/all_reduce.py)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.cuda.communicator import Communicator
from runtime.cuda.driver import Device
from runtime.cuda.kernels import Kernel
from runtime.program import BYTES

_LOG = logging.getLogger("runtime.nvlink")
REDUCE = "all_reduce."  # and a type: the names of kernels
_GIVEN = 64  # bytes that a rank tells the others at a time: a handle has so many


@dataclass(frozen=True)
class _Sum:
    """The kernel of a type, with the addresses that stay."""

    kernel: Kernel
    places: Mapping[str, int]
    most: int

    def fits(self, count: int) -> bool:
        """Whether so many elements are few enough, and whole units."""
        return count <= self.most and count % int(self.kernel.constants["unit"]) == 0

    def launch(self, source: int, target: int, count: int) -> None:
        """Add up so many elements of each rank."""
        unit, tile = (int(self.kernel.constants[name]) for name in ("unit", "tile"))
        values = {**self.places, "source": source, "target": target, "count": count // unit}
        self.kernel.launch((-(-count // tile), 1, 1), values)


class Peers:
    """A communicator whose sums of few elements are one launch each; it does all else by another of the same ranks."""

    def __init__(self, group: Communicator, device: Device, kernels: Mapping[str, Kernel]) -> None:
        """Give the other ranks access to memory of this one; `kernels` are by type. Use `peers` to make one."""
        self.rank, self.size = group.rank, group.size
        self._group, self._device, self._closed = group, device, False
        self.stop = device.allocate(4)  # not 0 once nobody is waited for
        device.fill(self.stop, 0, 4, 1)
        self._sums = {dtype: self._connect(dtype, kernel) for dtype, kernel in kernels.items()}

    def _connect(self, dtype: str, kernel: Kernel) -> _Sum:
        """The kernel of a type, when all ranks have a room for what the others send."""
        size, tile = kernel.constants["size"], kernel.constants["tile"]
        bytes_ = 2 * self.size * size * BYTES[dtype]
        own, handle = self._device.share(bytes_)
        self._device.fill(own, 0xFF, 1, bytes_)  # before anybody can write into it
        turns = self._device.allocate(4 * (size // tile))
        self._device.fill(turns, 0, 4, size // tile)
        handles = told(self._group, self._device, handle)
        # blocks wait for those of the others, so all must run at once on each
        blocks = [int.from_bytes(one, "little") for one in told(self._group, self._device, _number(kernel.resident()))]
        rooms = {
            f"room_{rank}": own if rank == self.rank else self._device.open(bytes(given))
            for rank, given in enumerate(handles)
        }
        places = {**rooms, "own": own, "turns": turns, "stop": self.stop, "rank": self.rank}
        return _Sum(kernel, places, min(size, tile * min(blocks)))

    def all_reduce(self, source: int, target: int, count: int, dtype: str, operation: str = "sum") -> None:
        """See Communicator."""
        one = self._sums.get(dtype)
        if one is not None and operation == "sum" and one.fits(count):
            one.launch(source, target, count)
        else:
            self._group.all_reduce(source, target, count, dtype, operation)

    def all_gather(self, source: int, target: int, count: int, dtype: str) -> None:
        """See Communicator."""
        self._group.all_gather(source, target, count, dtype)

    def abort(self) -> None:
        """See Communicator."""
        if not self._closed:
            self._device.write(self.stop, np.ones(1, np.int32))
        self._group.abort()

    def close(self) -> None:
        """See Communicator; the memory goes with the device's."""
        self._closed = True
        self._group.close()


def peers(group: Communicator, device: Device, kernels: Mapping[str, Kernel]) -> Communicator:
    """The communicator with sums in one launch, where there are kernels and each GPU reaches all others; else itself.

    `kernels` are a bundle's by name, `all_reduce.` and a type among them.
    """
    sums = {name.removeprefix(REDUCE): kernel for name, kernel in kernels.items() if name.startswith(REDUCE)}
    if not sums:
        return group
    ordinals = [given[0] for given in told(group, device, bytes([device.ordinal]))]
    reached = all(device.reaches(ordinal) for ordinal in ordinals)
    everywhere = all(given[0] for given in told(group, device, bytes([reached])))
    if not everywhere:
        _LOG.info("rank %d: sums by NCCL: GPUs %s do not all reach each other's memory", group.rank, ordinals)
        return group
    return Peers(group, device, sums)


def _number(value: int) -> bytes:
    return value.to_bytes(8, "little")


def told(group: Communicator, device: Device, given: bytes) -> Sequence[bytes]:
    """What each rank tells all others, up to 64 bytes, filled up with zeros."""
    mine, all_ = device.allocate(_GIVEN), device.allocate(_GIVEN * group.size)
    text = np.frombuffer(given.ljust(_GIVEN, b"\0"), np.uint8)  # stays until the copy is done
    device.upload(mine, text)
    group.all_gather(mine, all_, _GIVEN, "u8")
    found = np.empty((group.size, _GIVEN), np.uint8)
    device.wait()
    device.download(found, all_)
    device.wait()
    return [bytes(one) for one in found]
