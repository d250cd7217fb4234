"""Graph -> text. One equation a line, types on results only, places behind `@`."""

from __future__ import annotations

import math
from collections.abc import Iterator

from compiler.ir.core import Arg, AttrValue, Block, Equation, Graph, Value


def print_graph(graph: Graph, *, places: bool = True) -> str:
    """The text of a graph; `places=False` leaves out where in the spec each equation comes from."""
    inputs = ", ".join(_typed(value) for value in graph.inputs)
    lines = [f"graph {graph.name}({inputs}) {{"]
    lines += [f"  dim {sym}" for sym in graph.dims]
    lines += _equations(graph.equations, "  ", places)
    lines += ["  return " + ", ".join(f"{name} = {value}" for name, value in graph.outputs), "}"]
    return "\n".join(lines) + "\n"


def print_equation(equation: Equation, *, places: bool = False) -> str:
    """The text of one equation, with its body where it has one."""
    return "\n".join(_equation(equation, "", places))


def print_literal(value: AttrValue | Arg) -> str:
    """A literal as the parser reads it back: JSON-like, with `none`, `inf`, `nan` and tuples in parentheses."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "(" + ", ".join(print_literal(item) for item in value) + ")"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(value, float):
        if math.isnan(value):
            return "nan"
        if math.isinf(value):
            return "inf" if value > 0 else "-inf"
    return str(value) if isinstance(value, Value) else repr(value)


def _typed(value: Value) -> str:
    return f"{value}: {value.type}"


def _equations(equations: tuple[Equation, ...], indent: str, places: bool) -> Iterator[str]:
    for equation in equations:
        yield from _equation(equation, indent, places)


def _equation(equation: Equation, indent: str, places: bool) -> Iterator[str]:
    results = ", ".join(_typed(value) for value in equation.results)
    args = ", ".join("_" if arg is None else print_literal(arg) for arg in equation.args)
    text = f"{indent}{results} = {equation.op}({args})"
    if equation.attrs:
        text += " {" + ", ".join(f"{key} = {print_literal(value)}" for key, value in equation.attrs) + "}"
    place = f" @ {equation.where}" if places and equation.where is not None else ""
    if equation.body is None:
        yield text + place
        return
    yield from _body(text, equation.body, indent, place, places)


def _body(head: str, body: Block, indent: str, place: str, places: bool) -> Iterator[str]:
    params = ", ".join(_typed(value) for value in body.params)
    yield f"{head} ({params}) => {{{place}"
    yield from _equations(body.equations, indent + "  ", places)
    yield f"{indent}  yield " + ", ".join(str(value) for value in body.results)
    yield indent + "}"
