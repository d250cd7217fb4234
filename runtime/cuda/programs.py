"""Programs of kernels, for segments without an engine or beside one: for how many rows, and where their memory lies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

from runtime.cuda.arena import Interval, place


class Launches(Protocol):
    """A kernel that can be put into a stream."""

    def launch(self, grid: Sequence[int], values: Mapping[str, int]) -> None:
        """Start it; values are addresses and whole numbers by the names of its arguments."""


@dataclass(frozen=True)
class RowCall:
    """A launch of a program: `blocks` for each `tile` of the rows that the dims `rows` count, `depth` times.

    `places` by argument.
    """

    kernel: Launches
    rows: tuple[str, ...]
    blocks: int
    tile: int
    places: Mapping[str, str]
    depth: int = 1

    def count(self, dims: Mapping[str, int]) -> int:
        """How many rows there are."""
        return prod(dims[dim] for dim in self.rows)


@dataclass(frozen=True)
class RowProgram:
    """Launches in order; `temps` are bytes a row of memory that only they see."""

    calls: tuple[RowCall, ...]
    temps: Mapping[str, int]

    def count(self, dims: Mapping[str, int]) -> int:
        """The most rows of any launch."""
        return max(call.count(dims) for call in self.calls)

    def memory(self, rows: int) -> tuple[dict[str, int], int]:
        """Offsets of the temps at `rows` rows, and the bytes of all; two that are never needed together share some."""
        seen: dict[str, list[int]] = {}
        for index, call in enumerate(self.calls):
            for name in call.places.values():
                if name in self.temps:
                    seen.setdefault(name, []).append(index)
        return place([Interval(name, self.temps[name] * rows, at[0], at[-1]) for name, at in seen.items()])


def size_for(sizes: Iterable[int], rows: int) -> int:
    """The least size that holds so many rows; the largest takes more too."""
    known = sorted(sizes)
    return next((size for size in known if size >= rows), known[-1])


def most_rows(programs: Mapping[int, RowProgram], size: int, dims: Mapping[str, int]) -> int:
    """The most rows that the program of a size gets, where the dims have these sizes at most."""
    rows = programs[size].count(dims)
    return rows if size == max(programs) else min(rows, size)


def scratch_bytes(programs: Mapping[int, RowProgram], dims: Mapping[str, int]) -> int:
    """Bytes that the programs of one segment work in, one at a time."""
    return max(program.memory(most_rows(programs, size, dims))[1] for size, program in programs.items())
