"""Gives every attention of a decoder a linear KV cache, one row of places for each sequence: for TensorRT's own layers.

The small sibling of insert_kv_cache: the batch stays padded, [B,S], and one input says how many tokens of each sequence
the cache holds. A cache has at least one place more than any sequence: it is never written, stays zero, and so is a key
whose score is what a mask adds to it (compiler/lower/tensorrt/cached.py).
"""

from __future__ import annotations

from dataclasses import replace

from compiler.ir.core import Equation, Value
from compiler.ir.types import Dim, Shape, Sym, TensorType
from compiler.passes.insert_kv_cache import Inserter, insert
from compiler.passes.runner import Pass

ROUNDED = 64  # places of a cache are a multiple of this: rows of every sequence begin at whole cache lines
PAST = Value("past_lens", TensorType("i32", ("B",)))


def places(longest: int) -> int:
    """Places of the cache of a sequence of at most `longest` tokens."""
    return -(-(longest + 1) // ROUNDED) * ROUNDED


class _Linear(Inserter):
    rule = "cached_attention"
    metadata = (PAST,)
    new_dims = ()

    def dims(self) -> tuple[Sym, ...]:
        return ()

    def cache_shape(self, heads: Dim, dim: Dim) -> Shape:
        return ("B", heads, places(self.graph.dim("S").hi), dim)

    def attention(self, equation: Equation, caches: list[Value]) -> list[Equation]:
        q, k, v, positions, *rest = equation.args
        updates = []
        for operand, cache in zip((k, v), caches, strict=True):
            written = Value(self.names.unique(f"{cache.name}.new"), cache.type)
            updates.append(Equation("update_cache", (cache, operand, PAST), (written,), (), None, equation.where))
        args = (q, *(update.result for update in updates), positions, *rest)
        attrs = tuple(item for item in equation.attrs if item[0] != "causal")  # no other attention has a cache
        return [*updates, replace(equation, op="cached_attention", args=args, attrs=attrs)]


INSERT_LINEAR_CACHE = Pass("insert_linear_cache", lambda graph, log: insert(graph, log, _Linear), required=True)
