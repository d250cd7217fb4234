"""Attention by TensorRT's own layers, from 10.16 on: over a linear cache, and of an encoder.

What they are, from docs.nvidia.com/deeplearning/tensorrt, operators KVCacheUpdate and Attention:

- The cache [B,K,C,D] is an input of the network, C a number; what comes out of its update is an output, in the same
  memory. Tokens of sequence b go to the places from write_indices[b] on.
- Attention takes queries [B,H,S,D], scaled before, and a mask that is broadcast to [B,H,S,C]: bool, true where a key is
  seen, or numbers of the queries' type that are added to the scores.

Which keys a query sees always comes as a mask. The other way, `key_value_lengths` beside a causal kind (11), is refused
or gives wrong tokens on some GPUs (github.com/NVIDIA/TensorRT-Model-Connect, pull requests 1035 and 1048).
"""

from __future__ import annotations

from math import frexp

import numpy as np

from compiler.ir.core import Equation
from compiler.lower.tensorrt.attention import Keys, attended, by_equations, lead_of, mask, optional, slopes_of
from compiler.lower.tensorrt.capabilities import by_products
from compiler.lower.tensorrt.emitter import Emitter, Tensor, attr_float, emits
from compiler.lower.tensorrt.operations import transposed

# Added to the score of a key that is not seen: exp of it is 0 in float32, and no sum with it overflows in the type.
UNSEEN = {"f32": -1e30, "bf16": -1e30, "f16": -3e4}
_HEADS = [0, 2, 1, 3]  # [B,S,H,D] to [B,H,S,D] and back


@emits("attention")
def attention(e: Emitter, equation: Equation) -> Tensor:
    """Of an encoder: all its tokens at once, no cache."""
    k, v, positions = equation.values[1:4]
    others = (equation.attr.get(name) for name in ("softcap", "slopes"))
    plain = k.type.shape == v.type.shape and optional(equation, 5) is None and all(other is None for other in others)
    if not (e.native and plain):
        return by_equations(e, equation)
    batch, length = positions.type.shape
    keys = e.memo(
        ("keys", positions.name),
        lambda: e.reshape(e.scope[positions.name], (batch, length), (batch, 1, 1, length), "i32", "keys"),
    )

    def seen() -> Tensor:
        found = mask(e, equation, _at(e, equation), keys, 4)
        # a row for every query, also where all see the same: NVIDIA's page lets the mask's first two dims be 1, no more
        lowest = e.scalar(-(2**31) + 1, "i32", 4)
        every = e.unary("NOT", e.elementwise("LESS", _at(e, equation), lowest, "i32", "sees", result="bool"), "bool")
        return e.elementwise("AND", found, every, "bool", "sees")

    attr = equation.attr
    which = e.memo(("seen", attr["causal"], attr.get("window"), optional(equation, 4), positions.name), seen)
    rows = [transposed(e, e.scope[value.name], _HEADS, value.type.dtype, "heads") for value in (k, v)]
    return _layer(e, equation, rows[0], rows[1], which)


@emits("update_cache")
def update_cache(e: Emitter, equation: Equation) -> Tensor:
    cache, new, past = equation.values
    dtype = cache.type.dtype
    rows = transposed(e, e.scope[new.name], _HEADS, dtype, "heads")
    mode = e.trt.KVCacheMode.LINEAR
    return e.out(e.network.add_kv_cache_update(e.scope[cache.name], rows, e.scope[past.name], mode), dtype)


@emits("cached_attention")
def cached_attention(e: Emitter, equation: Equation) -> Tensor:
    _, k, v = equation.values[:3]
    if by_products(equation):
        return _products(e, equation)
    return _layer(e, equation, e.scope[k.name], e.scope[v.name], _mask(e, equation))


def _layer(e: Emitter, equation: Equation, keys: Tensor, values: Tensor, which: Tensor) -> Tensor:
    """TensorRT's attention of the first operand over [B,K,P,D], with a mask."""
    dtype = equation.result.type.dtype
    query = transposed(e, _scaled(e, equation), _HEADS, dtype, "heads")
    kind = e.trt.CausalMaskKind.NONE if e.dialect.attention == "add_attention_v2" else False
    softmax = e.trt.AttentionNormalizationOp.SOFTMAX
    assert e.dialect.attention is not None  # the capability table is checked before
    layer = getattr(e.network, e.dialect.attention)(query, keys, values, softmax, kind)
    layer.mask = which
    layer.decomposable = True  # where no fused kernel takes these sizes, by several
    return transposed(e, e.out(layer, dtype), _HEADS, dtype, "rows")


def _scaled(e: Emitter, equation: Equation) -> Tensor:
    """The queries times the scale, in float32 and rounded; a power of two needs no such care."""
    q, scale = equation.values[0], attr_float(equation, "scale")
    dtype, rank = q.type.dtype, q.type.rank
    wide = dtype if frexp(scale)[0] == 0.5 else "f32"
    x = e.cast(e.scope[q.name], dtype, wide)
    return e.cast(e.elementwise("PROD", x, e.scalar(scale, wide, rank), wide, "scaled"), wide, dtype)


def _places(e: Emitter, count: int, rank: int) -> Tensor:
    """Where the keys of a cache are: 0 to C - 1."""
    shape = (*(1,) * (rank - 1), count)
    return e.memo(("places", shape), lambda: e.constant(np.arange(count).reshape(shape), "i32"))


def _at(e: Emitter, equation: Equation) -> Tensor:
    """Where the queries are, [B,1,S,1]."""
    positions = equation.values[3]
    batch, length = positions.type.shape
    return e.memo(
        ("at", positions.name),
        lambda: e.reshape(e.scope[positions.name], (batch, length), (batch, 1, length, 1), "i32", "at"),
    )


def _mask(e: Emitter, equation: Equation) -> Tensor:
    """What the attention layer is given: bool where that says all, else numbers; one for all layers that agree."""
    prefix, sinks, attr = optional(equation, 4), optional(equation, 5), equation.attr
    count = int(equation.values[1].type.shape[2])
    key = (attr.get("window"), prefix, equation.values[3].name)
    seen = e.memo(("seen", *key), lambda: mask(e, equation, _at(e, equation), _places(e, count, 4), 4))
    if sinks is None and attr.get("slopes") is None:
        return seen
    dtype = equation.result.type.dtype
    if sinks is None:
        return e.memo(("mask", *key, attr["slopes"]), lambda: e.cast(_added(e, equation, seen), "f32", dtype))
    # the last place of a cache is never written: its key is zero, its score what is added, its value zero
    row: tuple[int, ...] = (1, *(int(dim) for dim in sinks.type.shape), 1, 1)
    logits = e.cast(e.scope[sinks.name], sinks.type.dtype, "f32")
    column = e.reshape(logits, sinks.type.shape, row, "f32", "sinks")
    slopes = slopes_of(e, equation, row)
    if slopes is not None:  # as the others are: relative to the query
        shift = e.elementwise("PROD", e.cast(_at(e, equation), "i32", "f32"), slopes, "f32", "shift")
        column = e.elementwise("SUB", column, shift, "f32", "sinks")
    last = e.elementwise("EQUAL", _places(e, count, 4), e.scalar(count - 1, "i32", 4), "i32", "last", result="bool")
    added = e.out(e.network.add_select(last, column, _added(e, equation, seen)), "f32", "with_sinks")
    return e.cast(added, "f32", dtype)


def _added(e: Emitter, equation: Equation, seen: Tensor) -> Tensor:
    """What is added to the scores, float32: the linear bias by the distance to the query, which differs from that by
    the key's position by a number for each query, and so is exact near the query in 16 bits; and UNSEEN.
    """
    count = int(equation.values[1].type.shape[2])
    slopes = slopes_of(e, equation, (1, int(equation.result.type.shape[2]), 1, 1))
    bias = e.scalar(0.0, "f32", 4)
    if slopes is not None:
        distance = e.elementwise("SUB", _places(e, count, 4), _at(e, equation), "i32", "distance")
        bias = e.elementwise("PROD", e.cast(distance, "i32", "f32"), slopes, "f32", "bias")
    unseen = e.scalar(UNSEEN[equation.result.type.dtype], "f32", 4)
    return e.out(e.network.add_select(seen, bias, unseen), "f32", "added")


def _products(e: Emitter, equation: Equation) -> Tensor:
    """Over the whole cache, as equations."""
    q, k = equation.values[:2]
    lead = lead_of(q, int(k.type.shape[1]))
    inner = (int(k.type.shape[1]), *(1,) * (len(lead) - 1))
    parts = []
    for value in equation.values[1:3]:
        batch, _, count, dim = value.type.shape
        wide = e.cast(e.scope[value.name], value.type.dtype, "f32")
        parts.append(e.reshape(wide, value.type.shape, (batch, *inner, count, dim), "f32", "keys"))
    return attended(e, equation, lead, Keys(parts[0], parts[1], _places(e, int(count), 3 + len(lead)), count))
