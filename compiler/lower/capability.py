"""What a backend says of an operation: exactly one of emit, decompose, unsupported, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from compiler.ir.core import Equation, Graph, walk
from specs.errors import SpecRTError


@dataclass(frozen=True)
class Emit:
    """The backend has this operation; `note` says what deserves to be known about it."""

    note: str = ""


@dataclass(frozen=True)
class Decompose:
    """The backend computes this operation by others; `rule` says how."""

    rule: str


@dataclass(frozen=True)
class Unsupported:
    """The backend can't compute this operation."""

    reason: str


Verdict = Emit | Decompose | Unsupported
Judge = Callable[[Equation], Verdict]


@dataclass(frozen=True)
class Types:
    """How a backend's table is filled: types that it computes in, that it only moves, and what it says of the rest."""

    floats: tuple[str, ...]
    integers: tuple[str, ...]
    moved: tuple[str, ...]
    rest: Mapping[str, Verdict]
    bools: Verdict  # of arithmetic on bool

    def float(self, verdict: Verdict) -> dict[str, Verdict]:
        """A row for an operation on floats."""
        return {**each(verdict, *self.floats), "f8e4m3": self.rest["f8e4m3"]}

    def number(self, verdict: Verdict) -> dict[str, Verdict]:
        """A row for arithmetic on floats and integers."""
        return {**self.rest, **each(verdict, *self.floats, *self.integers), "bool": self.bools}

    def any(self, verdict: Verdict) -> dict[str, Verdict]:
        """A row for what moves elements, of whatever type."""
        return {**self.rest, **each(verdict, *self.floats, *self.integers, *self.moved)}


def each(verdict: Verdict, *dtypes: str) -> dict[str, Verdict]:
    """The same verdict for several types."""
    return dict.fromkeys(dtypes, verdict)


def key_dtype(equation: Equation) -> str:
    """The element type that a capability table is keyed by: the result's, or the operand's where that decides."""
    if equation.op in ("compare", "cast", "quantize", "dequantize", "row_scale", "top_k"):
        return equation.values[0].type.dtype
    return equation.results[0].type.dtype


def check(graph: Graph, judge: Judge, backend: str) -> None:
    """Raise SpecRTError LOWER-001 at the first unsupported operation, with the others as notes."""
    missing = [
        (equation, verdict.reason)
        for equation in walk(graph.equations)
        if isinstance(verdict := judge(equation), Unsupported)
    ]
    if not missing:
        return
    texts = [f"`{bad.op}` of {key_dtype(bad)} (%{bad.results[0].name}): {reason}" for bad, reason in missing]
    notes = tuple(f"also {text}" for text in texts[1:])
    raise SpecRTError("LOWER-001", f"{backend} can't run {texts[0]}", where=missing[0][0].where, notes=notes)
