"""Joined weights keep their codes: a concatenation of dequantized weights becomes one dequantize of joined codes.

    concat(dequantize(a, s), dequantize(b, t)) {axis = -2}  ->  dequantize(concat(a, b), concat(s, t))

The passes that join products see to it that only weights of one kind meet (linears.py). A scale for a whole weight,
or for a square of it, becomes one for each of its rows.
"""

from __future__ import annotations

from dataclasses import replace

from compiler.ir.core import Arg, AttrValue, Equation, Graph, Value
from compiler.passes.rewrite import Names, beside, emit, remove_dead
from compiler.passes.runner import Log, Pass

RULE = "join_codes"


class RowScales:
    """Makes equations beside a dequantize; `out` collects them."""

    def __init__(self, names: Names, out: list[Equation], near: Equation) -> None:
        self.names, self.out, self.near = names, out, near

    def emit(self, op: str, *args: Arg, to: str, **attrs: AttrValue) -> Value:
        """One more equation, named beside the dequantize."""
        name = beside(self.near.result.name, to)
        return emit(self.out, self.names, op, *args, to=name, where=self.near.where, attrs=attrs)

    def by_row(self, codes: Value, scale: Value) -> Value:
        """A scale [rows, K] of codes [rows, M]; by adding zeros of that shape: the IR repeats nothing."""
        rows, count, groups = (int(str(size)) for size in (codes.type.shape[0], *scale.type.shape))
        if count == rows:
            return scale
        column = self.emit("slice", codes, to="column", axis=-1, start=0, stop=1)
        wide = self.emit("cast", column, to="column", dtype=scale.type.dtype)
        nothing = self.emit("sub", wide, wide, to="nothing")
        if count == 1:
            return self.emit("add", nothing, scale, to="scales")
        tall = int(str(self.block[-2]))
        whole = rows // tall  # squares that are no less high than the others
        upper = self.emit("slice", nothing, to="nothing", axis=-2, start=0, stop=whole * tall)
        upper = self.emit("reshape", upper, to="nothing", shape=(whole, tall, 1))
        own = self.emit("slice", scale, to="scales", axis=-2, start=0, stop=whole)
        own = self.emit("reshape", own, to="scales", shape=(whole, 1, groups))
        wide = self.emit(
            "reshape", self.emit("add", upper, own, to="scales"), to="scales", shape=(whole * tall, groups)
        )
        if whole == count:
            return wide
        lower = self.emit("slice", nothing, to="nothing", axis=-2, start=whole * tall, stop=rows)
        last = self.emit("slice", scale, to="scales", axis=-2, start=whole, stop=count)
        return self.emit("concat", wide, self.emit("add", lower, last, to="scales"), to="scales", axis=-2)

    @property
    def block(self) -> tuple[AttrValue, ...]:
        """The blocks of the dequantize, () without any."""
        found = self.near.attr.get("block")
        return found if isinstance(found, tuple) else ()

    @property
    def attrs(self) -> tuple[tuple[str, AttrValue], ...]:
        """The dequantize's attributes when it has scales by row."""
        wide = (*(1 for _ in self.block[:-1]), *self.block[-1:])
        return tuple((name, wide if name == "block" else value) for name, value in self.near.attrs)


def _join(graph: Graph, log: Log) -> Graph:
    names = Names(graph)
    equations = _block(graph.equations, names, log)
    return remove_dead(replace(graph, equations=equations)) if log.hits else graph


def _block(equations: tuple[Equation, ...], names: Names, log: Log) -> tuple[Equation, ...]:
    made = {equation.results[0].name: equation for equation in equations}
    out: list[Equation] = []
    for equation in equations:
        if equation.body is not None:
            inner = _block(equation.body.equations, names, log)
            out.append(replace(equation, body=replace(equation.body, equations=inner)))
            continue
        parts = [made.get(value.name) for value in equation.values] if equation.op == "concat" else []
        whole = [part for part in parts if part is not None and part.op == "dequantize"]
        if whole and len(whole) == len(parts):
            out += _joined(equation, whole, names)
            log.hit(RULE, equation.result.name, equation.where)
        else:
            out.append(equation)
    return tuple(out)


def _joined(equation: Equation, parts: list[Equation], names: Names) -> list[Equation]:
    out: list[Equation] = []
    codes = [part.values[0] for part in parts]
    scales = [RowScales(names, out, part).by_row(part.values[0], part.values[1]) for part in parts]
    columns = [codes, scales, *([[part.values[2] for part in parts]] if len(parts[0].values) == 3 else [])]
    near = RowScales(names, out, equation)
    args = tuple(
        near.emit("concat", *column, to=to, axis=-2)
        for column, to in zip(columns, ("codes", "scale", "zero"), strict=False)
    )
    return [*out, replace(equation, op="dequantize", args=args, attrs=RowScales(names, out, parts[0]).attrs)]


JOIN_CODES = Pass("join_codes", _join)
