"""Stores float32 matrices in float16 and widens them where they are read: half the file, float32 arithmetic."""

from __future__ import annotations

from dataclasses import replace

from compiler.ir.core import Equation, Graph, Value, map_blocks
from compiler.passes.rewrite import Names
from compiler.passes.runner import Log, Pass


def _apply(graph: Graph, log: Log) -> Graph:
    names = Names(graph)

    def change(equations: tuple[Equation, ...], results: tuple[Value, ...]) -> tuple[Equation, ...]:
        del results
        out: list[Equation] = []
        for equation in equations:
            value = equation.results[0]
            if equation.op != "weight" or value.type.dtype != "f32" or value.type.rank < 2:
                out.append(equation)
                continue
            half = Value(names.unique(f"{value.name}.f16"), value.type.with_dtype("f16"))
            out.append(replace(equation, results=(half,)))
            out.append(Equation("cast", (half,), (value,), (("dtype", "f32"),), None, equation.where))
            log.hit("f16_weight", value.name, equation.where)
        return tuple(out)

    return graph.with_equations(map_blocks(graph.equations, change, tuple(value for _, value in graph.outputs)))


STORE_HALVES = Pass("store_halves", _apply)
