"""Rounds keys and values to 8-bit codes and back in front of a cache that stays wide, where a target has none of codes.

%k = dequantize(quantize(k, s), s) with s = row_scale(k)
"""

from __future__ import annotations

from dataclasses import replace

from compiler.ir.core import Arg, Equation, Graph, Value, map_blocks
from compiler.passes.rewrite import Names, beside, emit
from compiler.passes.runner import Log, Pass


def round_kv_cache(codes: str) -> Pass:
    """The pass for codes without a zero: f8e4m3."""

    def apply(graph: Graph, log: Log) -> Graph:
        names = Names(graph)

        def rounded(x: Value, reader: Equation, out: list[Equation]) -> Value:
            def near(op: str, *args: Arg, to: str, dtype: str) -> Value:
                name = beside(x.name, to)
                return emit(out, names, op, *args, to=name, where=reader.where, attrs={"dtype": dtype})

            scale = near("row_scale", x, to="scale", dtype=codes)
            bits = near("quantize", x, scale, to=codes, dtype=codes)
            return near("dequantize", bits, scale, to="rounded", dtype=x.type.dtype)

        def change(equations: tuple[Equation, ...], results: tuple[Value, ...]) -> tuple[Equation, ...]:
            del results
            out: list[Equation] = []
            for equation in equations:
                if equation.op == "paged_attention":
                    q, k, v, *rest = equation.args
                    assert isinstance(k, Value)  # the type rule of attention
                    assert isinstance(v, Value)
                    args = (q, rounded(k, equation, out), rounded(v, equation, out), *rest)
                    log.hit(codes, equation.result.name, equation.where)
                    out.append(replace(equation, args=args))
                else:
                    out.append(equation)
            return tuple(out)

        return graph.with_equations(map_blocks(graph.equations, change, tuple(value for _, value in graph.outputs)))

    return Pass("round_kv_cache", apply, required=True)
