"""Heads that are cut, turned and joined: no values of their own, but where each element of the result comes from.

In a row [heads, dim] the partner that a rotation needs lies in another column: what was stored is read there too.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from compiler.ir.core import Equation, Value
from compiler.kernels.row_source import RefusedError, RowSource, rows_of


def ones_of(equations: Sequence[Equation]) -> set[str]:
    """Values that are constants of ones, whatever their type."""
    found: set[str] = set()
    for equation in equations:
        if equation.op == "const":
            ones = all(number == 1.0 for number in _flat(equation.attr["value"]))
        else:
            ones = equation.op == "cast" and equation.values[0].name in found
        if ones:
            found.add(equation.result.name)
    return found


def _flat(value: object) -> list[object]:
    return [number for part in value for number in _flat(part)] if isinstance(value, tuple) else [value]


def of_heads(equation: Equation, ones: Container[str] = ()) -> bool:
    """Whether an equation moves elements within heads [rows, heads, dim]; times ones, one head becomes several."""
    if not all(len(value.type.shape) == len(rows_of(value)) + 2 for value in (*equation.values[:1], equation.result)):
        return False
    if equation.op == "mul" and len(equation.values) == 2 and equation.values[1].name in ones:
        return equation.values[0].type.shape[-2] == 1 and rows_of(equation.values[0]) == rows_of(equation.result)
    return equation.op in ("slice", "rotate", "concat") and equation.attr.get("axis", -1) == -1


@dataclass
class HeadSource:
    """Writes the elements of one kernel's heads; `place` is where a value that was stored lies, None for another."""

    source: RowSource
    place: Callable[[Value], str | None]
    moved: dict[str, Equation] = field(default_factory=dict)

    def define(self, value: Value) -> None:
        """The value of an equation that moves, as a row in registers."""
        columns, dim = self.source.columns(value), int(value.type.shape[-1])
        at, ok = self.source.span(columns)
        text = self.element(value, f"({at} // {dim})", f"({at} % {dim})", ok)
        self.source.given(value, text)

    def element(self, value: Value, head: str, column: str, ok: str) -> str:
        """The variable of elements of a value at heads and columns, where `ok`."""
        equation = self.moved.get(value.name)
        if equation is None:
            return self._stored(value, head, column, ok)
        if equation.op == "slice":
            return self.element(equation.values[0], head, f"({column} + {equation.attr['start']})", ok)
        if equation.op == "mul":
            return self.element(equation.values[0], "0", column, ok)
        write = self._joined if equation.op == "concat" else self._turned
        return write(equation, head, column, ok)

    def _line(self, text: str) -> str:
        name = f"m{len(self.source.lines)}"
        self.source.lines.append(f"{name} = {text}")
        return name

    def _stored(self, value: Value, head: str, column: str, ok: str) -> str:
        place = self.place(value)
        if place is None:
            raise RefusedError(f"heads of %{value.name}, which is not stored")
        argument = self.source.pointer(place, value.type.dtype)
        where = f"row * {self.source.columns(value)} + {head} * {value.type.shape[-1]} + {column}"
        return self._line(f"tl.load({argument} + {where}, mask={ok}, other=0.0).to(tl.float32)")

    def _joined(self, equation: Equation, head: str, column: str, ok: str) -> str:
        found, start = "", 0
        for value in equation.values:
            size = int(value.type.shape[-1])
            here = self._line(f"({column} >= {start}) & ({column} < {start + size})")
            part = self.element(value, head, f"({column} - {start})", f"({ok} & {here})")
            found, start = part if not found else self._line(f"tl.where({here}, {part}, {found})"), start + size
        return found

    def _turned(self, equation: Equation, head: str, column: str, ok: str) -> str:
        """(a, b) becomes (a cos - b sin, b cos + a sin) (docs/ops.md)."""
        x, cos, sin = equation.values
        pairs = int(cos.type.shape[-1])
        if equation.attr["style"] == "half":
            pair, first = f"({column} % {pairs})", f"({column} < {pairs})"
            other = f"tl.where({first}, {column} + {pairs}, {column} - {pairs})"
        else:
            pair, first = f"({column} // 2)", f"({column} % 2 == 0)"
            other = f"({column} ^ 1)"
        inside = f"({ok} & ({column} < {2 * pairs}))"
        own, partner = self.element(x, head, column, ok), self.element(x, head, self._line(other), inside)
        c, s = (self._stored(angle, "0", pair, inside) for angle in (cos, sin))
        turned = f"{own} * {c} + tl.where({first}, -{partner}, {partner}) * {s}"
        return self._line(self.source.rounded(x, f"tl.where({column} < {2 * pairs}, {turned}, {own})"))
