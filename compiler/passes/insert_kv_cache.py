"""Gives every attention of a decoder a paged KV cache: `attention` becomes `paged_attention` on two states.

All or none: a graph with one attention that a cache can't serve (a key that later tokens change) stays as it is. The
metadata of the batch become graph inputs; they map one to one onto those of paged attention engines. With `codes` the
states hold rows of bytes, a scale and a zero before a token's codes (compiler/ir/cache_rows.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from compiler.ir.cache_rows import HEAD
from compiler.ir.core import Equation, Graph, Value, walk
from compiler.ir.names import is_template
from compiler.ir.types import Dim, Shape, Sym, TensorType
from compiler.passes.fuse_attention import over_tokens
from compiler.passes.pattern import Scope
from compiler.passes.rewrite import Names, beside, remove_dead
from compiler.passes.runner import Log, Pass

RULE = "paged_attention"
BLOCK = 32  # tokens in a cache block: what OpenVINO's paged attention has on the CPU
METADATA = (
    Value("past_lens", TensorType("i32", ("B",))),
    Value("seq_begins", TensorType("i32", ("B1",))),
    Value("block_ids", TensorType("i32", ("P",))),
    Value("block_begins", TensorType("i32", ("B1",))),
    Value("max_context", TensorType("i32")),
)
_NEW_DIMS = ("B1", "P", "C")


def insert(graph: Graph, log: Log, kind: type[Inserter]) -> Graph:
    """The graph with a cache of a kind for every attention, or as it is where one can't have it."""
    rule = kind.rule
    attentions = [equation for equation in walk(graph.equations) if equation.op == "attention"]
    reason = _graph_reason(graph, kind)
    for equation in attentions:
        why = reason or _reason(equation)
        if why is not None:
            log.refuse(rule, equation.result.name, equation.where, why)
    for equation in walk(graph.equations):
        if equation.op == "softmax" and over_tokens(equation):
            why = "attention that is not fused can't read a cache"
            log.refuse(rule, equation.result.name, equation.where, why)
    if not attentions:
        return graph
    if log.refusals:
        refused = {refusal.at for refusal in log.refusals}
        for equation in attentions:
            if equation.result.name not in refused:
                why = f"another attention of this graph has no cache (%{log.refusals[0].at})"
                log.refuse(rule, equation.result.name, equation.where, why)
        return graph
    return kind(graph, log).run()


def _graph_reason(graph: Graph, kind: type[Inserter]) -> str | None:
    names = {value.name for value in graph.inputs} | {sym.name for sym in graph.dims}
    taken = [name for name in (*(value.name for value in kind.metadata), *kind.new_dims) if name in names]
    if taken:
        return f"the graph already has `{taken[0]}`"
    tokens = next((value for value in graph.inputs if value.name == "tokens"), None)
    if tokens is None or tokens.type.shape != ("B", "S"):
        return "the graph has no input tokens[B,S]"
    return None


def _reason(equation: Equation) -> str | None:
    if equation.attr["causal"] is not True:
        return "not causal: later tokens change what earlier ones compute, so nothing can be kept"
    positions = equation.args[3]
    assert isinstance(positions, Value)  # the type rule of attention
    if positions.name != "positions":
        return f"attends by %{positions.name}, not by the input `positions`"
    return None


class Inserter:
    """Puts a paged cache into a graph; a sibling says what its own cache needs instead."""

    rule = RULE
    codes: str | None = None
    metadata: tuple[Value, ...] = METADATA
    new_dims: tuple[str, ...] = _NEW_DIMS

    def __init__(self, graph: Graph, log: Log) -> None:
        self.graph, self.log = graph, log
        self.names = Names(graph)
        self.stored: set[str] = set()

    def run(self) -> Graph:
        outputs = tuple(value for _, value in self.graph.outputs)
        scope = Scope(self.graph.equations, outputs)
        equations: list[Equation] = []
        for equation in scope.equations:
            if equation.body is None:
                equations += self.equation(equation, scope, inside=False)
                continue
            body = equation.body
            inner = Scope(body.equations, body.results, scope.definitions)
            changed = [new for old in body.equations for new in self.equation(old, inner, inside=True)]
            equations.append(replace(equation, body=replace(body, equations=tuple(changed))))
        graph = replace(
            self.graph,
            dims=(*self.graph.dims, *self.dims()),
            inputs=(*self.graph.inputs, *self.metadata),
            equations=tuple(equations),
        )
        return remove_dead(graph)

    def dims(self) -> tuple[Sym, ...]:
        """What the metadata and the caches have beside the dims of the graph."""
        batch, length = self.graph.dim("B"), self.graph.dim("S")
        blocks = [rows * -(-tokens // BLOCK) for rows, tokens in ((batch.opt, length.opt), (batch.hi, length.hi))]
        return (
            Sym("B1", batch.lo + 1, batch.opt + 1, batch.hi + 1),
            Sym("P", 1, *blocks),
            Sym("C", 1, *blocks),
        )

    def cache_shape(self, heads: Dim, dim: Dim) -> Shape:
        """The shape of the cache of so many heads."""
        return ("C", heads, BLOCK, dim)

    def cache_type(self, heads: Dim, dim: Dim) -> TensorType:
        """The type of the cache of so many heads: numbers, or rows of codes."""
        if self.codes is None:
            return TensorType("f32", self.cache_shape(heads, dim))
        assert isinstance(dim, int)  # the type rule of attention
        return TensorType("u8", self.cache_shape(heads, dim + HEAD))

    def equation(self, equation: Equation, scope: Scope, *, inside: bool) -> list[Equation]:
        if equation.op != "attention":
            return [equation]
        self.log.hit(self.rule, equation.result.name, equation.where)
        states = self.states(equation, scope, inside=inside)
        return [*states, *self.attention(equation, [state.result for state in states])]

    def states(self, equation: Equation, scope: Scope, *, inside: bool) -> list[Equation]:
        """The caches of the keys and the values of an attention."""
        prefix = cache_prefix(equation, scope, inside=inside)
        states = []
        for operand, letter in zip(equation.values[1:3], "kv", strict=True):
            kind = self.cache_type(*operand.type.shape[-2:])
            cache = Value(self.names.unique(beside(equation.result.name, f"{letter}_cache")), kind)
            attrs = (("name", self.unique_state(prefix, letter)),)
            states.append(Equation("state", (), (cache,), attrs, None, equation.where))
        return states

    def attention(self, equation: Equation, caches: list[Value]) -> list[Equation]:
        """What an attention becomes, over its caches."""
        q, k, v, _, *rest = equation.args
        attrs = equation.attrs if self.codes is None else (*equation.attrs, ("codes", self.codes))
        args = (q, k, v, *caches, *self.metadata, *rest)
        return [replace(equation, op="paged_attention", args=args, attrs=attrs)]

    def unique_state(self, prefix: str, letter: str) -> str:
        name, number = f"{prefix}.{letter}", 1
        while name in self.stored:
            number += 1
            name = f"{prefix}.{number}.{letter}"
        self.stored.add(name)
        return name


class _U8(Inserter):
    codes = "u8"


class _Float8(Inserter):
    codes = "f8e4m3"


def insert_kv_cache(codes: str | None = None) -> Pass:
    """The pass for a paged cache of the attention's own type, or of 8-bit codes: u8 or f8e4m3."""
    return Pass("insert_kv_cache", lambda graph, log: insert(graph, log, _KINDS[codes]), required=True)


def cache_prefix(equation: Equation, scope: Scope, *, inside: bool) -> str:
    """The name of an attention's cache: what the names of its query, key and value weights share, `layers.{i}.attn`."""
    weights = [name for arg in equation.values[:3] for name in _weights(arg, scope)]
    shared = _common([name.split(".") for name in weights]) if weights else ""
    shared = shared or equation.result.name
    return shared if is_template(shared) or not inside else f"layers.{{i}}.{shared}"


def _weights(value: Value, scope: Scope) -> list[str]:
    """Names of the weights of the nearest products that a value comes from."""
    names: list[str] = []
    seen: set[str] = set()
    todo = [value]
    while todo:
        definition = scope.definition(todo.pop())
        if definition is None or definition.results[0].name in seen:
            continue
        seen.add(definition.results[0].name)
        if definition.op == "weight":
            names.append(str(definition.attr["name"]))
        elif definition.op == "matmul":
            todo.append(definition.values[1])
        else:
            todo.extend(definition.values)
    return names


def _common(paths: list[list[str]]) -> str:
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


_KINDS: Mapping[str | None, type[Inserter]] = {None: Inserter, "u8": _U8, "f8e4m3": _Float8}
INSERT_KV_CACHE = insert_kv_cache()
