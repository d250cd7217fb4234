"""Writes out every round of `repeat`: for targets that run layers one by one, with steps between engines.

Values of round 3 are named `layers.3.NAME`; weights and states get the names that they are stored under.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from compiler.ir.core import Arg, AttrValue, Equation, Graph, Value, substitute
from compiler.ir.names import expand
from compiler.passes.rewrite import Names
from compiler.passes.runner import Log, Pass

RULE = "unroll"


def unroll(graph: Graph, log: Log | None = None) -> Graph:
    """The same graph without `repeat`."""
    names = Names(graph)
    mapping: dict[str, Arg] = {}
    equations: list[Equation] = []
    for equation in graph.equations:
        if equation.body is None:
            equations.append(substitute(equation, mapping))
            continue
        if log is not None:
            log.hit(RULE, equation.results[0].name, equation.where)
        carried: list[Arg] = [mapping.get(value.name, value) for value in equation.values]
        count = equation.attr["count"]
        assert isinstance(count, int)  # C4
        for index in range(count):
            inner = {**mapping, **dict(zip((value.name for value in equation.body.params), carried, strict=True))}
            for old in equation.body.equations:
                equations.append(in_round(old, inner, index, names))
                inner.update(zip((value.name for value in old.results), equations[-1].results, strict=True))
            carried = [inner.get(value.name, value) for value in equation.body.results]
        mapping.update(zip((value.name for value in equation.results), carried, strict=True))
    outputs = tuple((name, value_of(mapping, value)) for name, value in graph.outputs)
    return replace(graph, equations=tuple(equations), outputs=outputs)


def in_round(equation: Equation, mapping: Mapping[str, Arg], index: int, names: Names) -> Equation:
    """An equation of a body as round `index` has it, under a name of its own."""
    results = tuple(Value(names.unique(f"layers.{index}.{value.name}"), value.type) for value in equation.results)
    attrs = equation.attrs
    if equation.op in ("weight", "state"):
        attrs = tuple((key, _stored(value, index) if key == "name" else value) for key, value in attrs)
    return replace(substitute(equation, mapping), results=results, attrs=attrs)


def _stored(name: AttrValue, index: int) -> AttrValue:
    return expand(str(name), index)


def value_of(mapping: Mapping[str, Arg], value: Value) -> Value:
    """What a value became."""
    found = mapping.get(value.name, value)
    assert isinstance(found, Value)  # carried values are no literals
    return found


UNROLL = Pass("unroll", unroll)
