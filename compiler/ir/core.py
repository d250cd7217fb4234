"""The IR's data: values, equations, blocks and graphs, all frozen, and the ways to walk and rebuild them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from compiler.ir.types import Sym, TensorType
from specs.errors import Where

Scalar = int | float | bool | str | None
AttrValue = Scalar | tuple["AttrValue", ...]


@dataclass(frozen=True)
class Value:
    """The result of one equation, an input, or a parameter of a `repeat` body; its name is unique in the graph."""

    name: str
    type: TensorType

    def __str__(self) -> str:
        return f"%{self.name}"


# An operand: a value, a scalar literal (elementwise operations only), or None for an optional operand left out.
Arg = Value | float | int | bool | None


@dataclass(frozen=True)
class Block:
    """The body of a `repeat`: parameters are the carried values, results are what the next round carries."""

    params: tuple[Value, ...]
    equations: tuple[Equation, ...]
    results: tuple[Value, ...]


@dataclass(frozen=True)
class Equation:
    """`results = op(args) {attrs} body`, with the place in the spec that it comes from (not part of equality)."""

    op: str
    args: tuple[Arg, ...]
    results: tuple[Value, ...]
    attrs: tuple[tuple[str, AttrValue], ...] = ()
    body: Block | None = None
    where: Where | None = field(default=None, compare=False)

    @cached_property
    def attr(self) -> Mapping[str, AttrValue]:
        return dict(self.attrs)

    @property
    def result(self) -> Value:
        (value,) = self.results
        return value

    @property
    def values(self) -> tuple[Value, ...]:
        """The operands that are values."""
        return tuple(arg for arg in self.args if isinstance(arg, Value))


@dataclass(frozen=True)
class Graph:
    """A whole model, or a segment of one: symbolic dims, inputs, equations and named outputs."""

    name: str
    dims: tuple[Sym, ...]
    inputs: tuple[Value, ...]
    equations: tuple[Equation, ...]
    outputs: tuple[tuple[str, Value], ...]

    def __str__(self) -> str:
        from compiler.ir.printer import print_graph

        return print_graph(self)

    def dim(self, name: str) -> Sym:
        return next(sym for sym in self.dims if sym.name == name)

    def with_equations(self, equations: tuple[Equation, ...]) -> Graph:
        return replace(self, equations=equations)


def walk(equations: tuple[Equation, ...]) -> Iterator[Equation]:
    """Every equation, outer before inner, in order."""
    for equation in equations:
        yield equation
        if equation.body is not None:
            yield from walk(equation.body.equations)


def used_values(equation: Equation) -> Iterator[Value]:
    """Every value that an equation reads, with those its body captures or yields."""
    yield from equation.values
    if equation.body is not None:
        for inner in equation.body.equations:
            yield from used_values(inner)
        yield from equation.body.results


def substitute(equation: Equation, mapping: Mapping[str, Arg]) -> Equation:
    """The equation with operands (also in its body) replaced by name."""

    def swap(arg: Arg) -> Arg:
        return mapping.get(arg.name, arg) if isinstance(arg, Value) else arg

    def swap_value(value: Value) -> Value:
        new = swap(value)
        if not isinstance(new, Value):
            raise TypeError(f"{value} is a result of a block and can't become the literal {new}")
        return new

    body = equation.body
    if body is not None:
        body = Block(
            body.params,
            tuple(substitute(inner, mapping) for inner in body.equations),
            tuple(swap_value(value) for value in body.results),
        )
    return replace(equation, args=tuple(swap(arg) for arg in equation.args), body=body)


def map_blocks(
    equations: tuple[Equation, ...],
    change: Callable[[tuple[Equation, ...], tuple[Value, ...]], tuple[Equation, ...]],
    results: tuple[Value, ...],
) -> tuple[Equation, ...]:
    """Apply `change(equations, results)` to every block, innermost first."""
    inner = tuple(
        equation
        if equation.body is None
        else replace(
            equation,
            body=replace(equation.body, equations=map_blocks(equation.body.equations, change, equation.body.results)),
        )
        for equation in equations
    )
    return change(inner, results)


def eliminate_dead(graph: Graph, has_effect: Callable[[str], bool]) -> Graph:
    """The graph without equations whose results nothing uses; operations with an effect stay."""

    def sweep(equations: tuple[Equation, ...], results: tuple[Value, ...]) -> tuple[Equation, ...]:
        live = {value.name for value in results}
        kept: list[Equation] = []
        for equation in reversed(equations):
            effect = any(has_effect(inner.op) for inner in walk((equation,)))
            if effect or any(value.name in live for value in equation.results):
                kept.append(equation)
                live.update(value.name for value in used_values(equation))
        return tuple(reversed(kept))

    outputs = tuple(value for _, value in graph.outputs)
    return graph.with_equations(map_blocks(graph.equations, sweep, outputs))
