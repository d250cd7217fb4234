"""How the ranks of tensor parallelism hold a value: whole, split along an axis, or as a sum not added up yet."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from compiler.ir.core import Value


@dataclass(frozen=True)
class Split:
    """Rank r of R has part r * parts // R along `axis`, counted from the end; parts are equal and divide R.

    `own`: instead, a dim of 1 that each rank has a number of its own for (a scale of its part). `origins` are
    the products whose output features were split for it.
    """

    axis: int
    parts: int
    origins: frozenset[str]
    own: bool = False


@dataclass(frozen=True)
class Sum:
    """What all ranks have added up, and then `plus` values that all have: biases, the residual."""

    plus: tuple[Value, ...] = ()


Layout = Split | Sum | None  # None: every rank has all of it


@dataclass(frozen=True)
class Held:
    """What a rank has in place of a value of the whole graph."""

    value: Value
    layout: Layout = None


class MismatchError(Exception):
    """An operation can't take a value that is split: the products it comes from must have fewer parts."""

    def __init__(self, splits: Iterable[Split], reason: str, parts: int = 1) -> None:
        super().__init__(reason)
        self.origins = frozenset(origin for split in splits for origin in split.origins)
        self.reason, self.parts = reason, parts
