"""Packs rows and columns of the batch, [B,S,...], into one run of tokens, [T,...]: no padding is computed.

Everything that works on each token alone is packed as it is; attention reads from the metadata which tokens belong
together. The first equation that mixes B and S in another way stops the pass, with the reason.
"""

from __future__ import annotations

from dataclasses import replace

from compiler.ir.core import Block, Equation, Graph, Value, walk
from compiler.ir.ops import TypeRuleError
from compiler.ir.types import Shape, Sym
from compiler.passes.rewrite import remove_dead
from compiler.passes.rows import has_rows, replace_rows, replaced_type, why_not
from compiler.passes.runner import Log, Pass
from specs.errors import Where

RULE = "pack_tokens"


class _CannotPackError(Exception):
    def __init__(self, equation: Equation, reason: str) -> None:
        super().__init__(reason)
        self.at, self.where, self.reason = equation.results[0].name, equation.where, reason


def _pack(graph: Graph, log: Log) -> Graph:
    tokens = next((value for value in graph.inputs if value.name == "tokens"), None)
    if tokens is None or tokens.type.rank != 2:
        at = "tokens" if tokens is None else tokens.name
        log.refuse(RULE, at, None, "the graph has no input tokens[B,S]")
        return graph
    try:
        # dead equations (masks that fusion left over) are no obstacle
        packed = _Packer(remove_dead(graph), tokens.type.shape).run()
    except _CannotPackError as stop:
        log.refuse(RULE, stop.at, stop.where, stop.reason)
        return graph
    log.hit(RULE, tokens.name, _first_place(graph))
    return packed


class _Packer:
    def __init__(self, graph: Graph, rows: Shape) -> None:
        self.graph, self.old = graph, rows
        self.new: Shape = ("T",)
        self.values: dict[str, Value] = {}

    def run(self) -> Graph:
        graph = self.graph
        inputs = tuple(self.packed(value) for value in graph.inputs)
        equations = self.block(graph.equations)
        outputs = tuple((name, self.values.get(value.name, value)) for name, value in graph.outputs)
        batch, length = (graph.dim(str(dim)) for dim in self.old)
        packed = Sym("T", 1, batch.opt * length.opt, batch.hi * length.hi)
        used = {dim for value in (*inputs, *_results(equations)) for dim in value.type.shape}
        dims = (packed, *(sym for sym in graph.dims if sym.name in used))
        return Graph(graph.name, dims, inputs, equations, outputs)

    def packed(self, value: Value) -> Value:
        if has_rows(value, self.old):
            value = self.values[value.name] = Value(value.name, replaced_type(value.type, self.old, self.new))
        return value

    def block(self, equations: tuple[Equation, ...]) -> tuple[Equation, ...]:
        return tuple(self.equation(equation) for equation in equations)

    def equation(self, equation: Equation) -> Equation:
        if equation.body is not None:
            return self.repeat(equation)
        if not any(has_rows(arg, self.old) for arg in equation.args):
            mixed = next((value for value in equation.results if self.old[1] in value.type.shape), None)
            if mixed is not None:
                raise _CannotPackError(
                    equation, f"%{mixed.name} is {mixed.type}, which has {self.old[1]} but not B and S together"
                )
            return equation
        reason = why_not(equation, self.old)
        if reason is None:
            try:
                new = replace_rows(equation, self.values, self.old, self.new)
            except TypeRuleError as error:
                raise _CannotPackError(equation, str(error)) from error
            self.values.update((value.name, value) for value in new.results)
            return new
        raise _CannotPackError(equation, reason)

    def repeat(self, equation: Equation) -> Equation:
        body = equation.body
        assert body is not None
        args = tuple(self.values.get(value.name, value) for value in equation.values)
        params = tuple(self.packed(value) for value in body.params)
        equations = self.block(body.equations)
        results = tuple(self.values.get(value.name, value) for value in body.results)
        outs = tuple(self.packed(value) for value in equation.results)
        return replace(equation, args=args, results=outs, body=Block(params, equations, results))


def _results(equations: tuple[Equation, ...]) -> list[Value]:
    return [value for equation in walk(equations) for value in equation.results]


def _first_place(graph: Graph) -> Where | None:
    return next((equation.where for equation in graph.equations if equation.where is not None), None)


PACK_TOKENS = Pass("pack_tokens", _pack, required=True)
