"""Places values in one piece of device memory: two that are never needed at the same time may share bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.program import BYTES, Program

SETS = 2  # of values that come from another stage: one is read while the next is written
ALIGN = 256  # bytes: what TensorRT asks of a binding, and whole vectors for the kernels


@dataclass(frozen=True)
class Interval:
    """A value of `size` bytes, needed from the step that writes it to the last that reads it, both included."""

    name: str
    size: int
    first: int
    last: int


def aligned(size: int) -> int:
    """The size rounded up to whole units of ALIGN."""
    return -(-size // ALIGN) * ALIGN


def place(intervals: Sequence[Interval]) -> tuple[dict[str, int], int]:
    """Offsets by name, and the bytes of the whole: largest first, each at the lowest place that is free while it lives.

    For intervals this greedy order is within some percent of the optimum in practice (arXiv:2001.03288, section 4).
    """
    placed: list[tuple[int, Interval]] = []
    for interval in sorted(intervals, key=lambda item: (-item.size, item.first, item.name)):
        size = aligned(interval.size)
        offset = 0
        for start, other in placed:  # by offset
            if other.first > interval.last or other.last < interval.first:
                continue
            if start - offset >= size:
                break
            offset = max(offset, start + aligned(other.size))
        placed.append((offset, interval))
        placed.sort(key=lambda item: item[0])
    total = max((start + aligned(item.size) for start, item in placed), default=0)
    return {item.name: start for start, item in placed}, total


def intervals(program: Program, dims: Mapping[str, int]) -> list[Interval]:
    """When each value between steps is needed, and its bytes where the named dims have these sizes.

    Inputs of the model are not among them; outputs are needed until all steps are done, and so is what goes to another
    stage of a pipeline. What comes from one keeps its place.
    """
    first = dict.fromkeys(program.received, 0)
    last: dict[str, int] = {}
    for index, step in enumerate(program.steps):
        for name in step.outputs.values():
            first.setdefault(name, index)
            last[name] = max(last.get(name, index), index)
        for name in step.inputs.values():
            if name in first:
                last[name] = index
    for name in (*program.values.values(), *program.received, *program.sent):
        if name in first:
            last[name] = len(program.steps)
    return [Interval(name, value_bytes(program, name, dims), first[name], last[name]) for name in first]


def handed(program: Program, dims: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Offsets of the values that come from another stage, by name, one after the other, and the bytes of all."""
    offsets: dict[str, int] = {}
    total = 0
    for name in program.received:
        offsets[name], total = total, total + aligned(value_bytes(program, name, dims))
    return offsets, total


def value_bytes(program: Program, name: str, dims: Mapping[str, int]) -> int:
    """Bytes of a value where the named dims have these sizes."""
    port = program.types[name]
    size = BYTES[port.dtype]
    for dim in port.shape:
        size *= dim if isinstance(dim, int) else dims[dim]
    return size
