"""Attention parts -> the plain equations of the paper, which the fusion passes recognise afterwards.

One shape serves multi-head, multi-query and grouped-query attention: queries [B,K,G,S,D] with G = H/K broadcast over
keys [B,K,1,S,D].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from compiler.frontend.context import Context
from compiler.frontend.parts import layer_norm, linear, rms_norm, width
from compiler.frontend.rope import rotate, rotate_block
from compiler.ir import TensorType, Value
from specs import parts as schema
from specs import positions

MASKED = -3.4028234663852886e38  # the lowest float32: a row of nothing but padding stays finite
_HEADS_FIRST = (-3, -2, -4, -1)  # [B,S,K,G,D] -> [B,K,G,S,D]
_TOKENS_FIRST = (-2, -4, -3, -1)  # [B,K,G,S,D] -> [B,S,K,G,D]


@dataclass(frozen=True)
class Heads:
    """H query heads, K key heads, D dims each."""

    query: int
    key: int
    dim: int


def attention_part(ctx: Context, name: str, part: schema.Attention, x: Value) -> Value:
    """Self-attention of x [B,S,M]."""
    env = ctx.env
    heads = Heads(part.heads.as_int(env), part.kv_heads.as_int(env), part.d_head.as_int(env))
    qkv_bias, out_bias = (False, False) if part.bias is None else (ctx.flag(part.bias.qkv), ctx.flag(part.bias.out))
    clip = None if part.clip is None else part.clip.value(env)

    def project(leaf: str, count: int) -> Value:
        y = linear(ctx, leaf, x, count * heads.dim, qkv_bias)
        return head_rows(ctx, leaf, y if clip is None else _clipped(ctx, leaf, y, float(clip)), count)

    q, k, v = (
        project(f"{name}.{leaf}", count) for leaf, count in (("q", heads.query), ("k", heads.key), ("v", heads.key))
    )
    if part.qk_norm is not None and (part.qk_norm.when is None or ctx.flag(part.qk_norm.when)):
        q = _qk_norm(ctx, f"{name}.q_norm", part.qk_norm, q)
        k = _qk_norm(ctx, f"{name}.k_norm", part.qk_norm, k)
    if isinstance(part.position, positions.Rope):
        q, k = rotate(ctx, name, part.position, q), rotate(ctx, name, part.position, k)
    if isinstance(part.position, positions.BlockRope):
        q, k = rotate_block(ctx, name, part.position, q), rotate_block(ctx, name, part.position, k)
    scores = _scores(ctx, name, part, heads, q, k)
    sink = _sink(ctx, name, heads) if ctx.flag(part.sinks) else None
    joined = mix(ctx, name, scores, attention_mask(ctx, part), v, heads, sink)
    return linear(ctx, f"{name}.o", joined, width(x), out_bias)


def mix(ctx: Context, name: str, scores: Value, mask: Value, v: Value, heads: Heads, sink: Value | None) -> Value:
    """The values v[B,S,K,E], weighed by the softmax of scores[B,K,G,S,S] where `mask` holds: [B,S,H*E]."""
    masked = ctx.emit("where", mask, scores, MASKED, to=f"{name}.masked")
    weights = ctx.emit("softmax", masked, *([] if sink is None else [sink]), to=f"{name}.softmax")
    mixed = ctx.emit("matmul", weights, grouped(ctx, f"{name}.v", v, heads.key, 1), to=f"{name}.mixed")
    mixed = ctx.emit("transpose", mixed, to=f"{name}.mixed", axes=_TOKENS_FIRST)
    return ctx.emit("reshape", mixed, to=f"{name}.joined", shape=("B", "S", heads.query * width(v)))


def _clipped(ctx: Context, name: str, x: Value, limit: float) -> Value:
    above = ctx.emit("maximum", x, -limit, to=f"{name}.clipped")
    return ctx.emit("minimum", above, limit, to=f"{name}.clipped")


def _sink(ctx: Context, name: str, heads: Heads) -> Value:
    """One logit for each head, [K,G,1,1]."""
    sinks = ctx.weight(f"{name}.sinks", "weight", heads.query)
    shape = (heads.key, heads.query // heads.key, 1, 1)
    return ctx.emit("reshape", sinks, to=f"{name}.sink", shape=shape)


def head_rows(ctx: Context, name: str, x: Value, count: int) -> Value:
    """[B,S,count*D] as [B,S,count,D]."""
    return ctx.emit("reshape", x, to=f"{name}.heads", shape=("B", "S", count, width(x) // count))


def grouped(ctx: Context, name: str, x: Value, groups: int, each: int) -> Value:
    """[B,S,K*G,D] as [B,K,G,S,D]."""
    shape = ("B", "S", groups, each, x.type.shape[-1])
    return ctx.emit("transpose", ctx.emit("reshape", x, to=f"{name}.grouped", shape=shape), to=name, axes=_HEADS_FIRST)


def _qk_norm(ctx: Context, name: str, norm: schema.QkNorm, x: Value) -> Value:
    eps, gain = norm.eps.as_float(ctx.env), ctx.option(norm, "gain", "weight")
    if ctx.option(norm, "norm", "rms_norm") == "layer_norm":
        return layer_norm(ctx, name, x, eps, gain, bias=True)
    return rms_norm(ctx, name, x, eps, gain)


def _scores(ctx: Context, name: str, part: schema.Attention, heads: Heads, q: Value, k: Value) -> Value:
    env = ctx.env
    queries = grouped(ctx, f"{name}.q", q, heads.key, heads.query // heads.key)
    keys = grouped(ctx, f"{name}.k", k, heads.key, 1)
    scale = part.scale.as_float(env) if part.scale is not None else 1.0 / math.sqrt(heads.dim)
    scores = ctx.emit("matmul", queries, keys, to=f"{name}.scores", transpose_b=True)
    alibi = part.position if isinstance(part.position, positions.Alibi) else None
    if alibi is not None and ctx.flag(alibi.scaled):
        scores = ctx.emit("add", scores, _alibi(ctx, alibi, heads), to=f"{name}.biased")
    scores = ctx.emit("mul", scores, scale, to=f"{name}.scaled")
    cap = None if part.softcap is None else part.softcap.value(env)
    if cap is not None:
        squeezed = ctx.emit("tanh", ctx.emit("div", scores, float(cap), to=f"{name}.capped"), to=f"{name}.capped")
        scores = ctx.emit("mul", squeezed, float(cap), to=f"{name}.capped")
    if alibi is not None and not ctx.flag(alibi.scaled):
        scores = ctx.emit("add", scores, _alibi(ctx, alibi, heads), to=f"{name}.biased")
    return scores


# -- what all layers share: positions, masks, biases ---------------------------------------------------------------


def _positions(ctx: Context) -> tuple[Value, Value]:
    """Positions of queries [B,1,1,S,1] and of keys [B,1,1,1,S]."""

    def make() -> tuple[Value, Value]:
        positions = ctx.input("positions", "i32", "B", "S")
        query = ctx.emit("reshape", positions, to="mask.query", shape=("B", 1, 1, "S", 1))
        return query, ctx.emit("reshape", positions, to="mask.key", shape=("B", 1, 1, 1, "S"))

    return ctx.shared("positions", make)  # type: ignore[no-any-return]


def attention_mask(ctx: Context, part: schema.Attention | schema.LatentAttention) -> Value:
    """Which keys each query sees, bool broadcast to [B,1,1,S,S]; once for all layers that agree on it."""
    window = None if part.window is None else part.window.value(ctx.env)
    kind = ctx.option(part, "mask")
    return ctx.shared(("mask", kind, window), lambda: _make_mask(ctx, kind, window))  # type: ignore[no-any-return]


def _make_mask(ctx: Context, kind: str, window: int | None) -> Value:
    query, key = _positions(ctx)
    mask = ctx.emit("compare", key, 0, to="mask.valid", kind="ge")
    if kind != "full":
        seen = ctx.emit("compare", key, query, to="mask.causal", kind="le")
        if kind == "prefix":
            prefix = ctx.emit("reshape", ctx.input("prefix", "i32", "B"), to="mask.prefix", shape=("B", 1, 1, 1, 1))
            before = ctx.emit("compare", key, prefix, to="mask.before", kind="lt")
            seen = ctx.emit("or", seen, before, to="mask.seen")
        mask = ctx.emit("and", mask, seen, to="mask")
    if window is not None:
        gap = ctx.emit("sub", query, key, to="mask.gap")
        near = ctx.emit("compare", gap, int(window), to="mask.near", kind="lt")
        mask = ctx.emit("and", mask, near, to="mask")
    return mask


def _alibi(ctx: Context, alibi: positions.Alibi, heads: Heads) -> Value:
    """slope * key position (arXiv:2108.12409); equal up to a constant per row to slope * (key - query)."""
    max_bias = 8.0 if alibi.max_bias is None else alibi.max_bias.as_float(ctx.env)
    rounded = ctx.flag(alibi.rounded)

    def make() -> Value:
        _, key = _positions(ctx)
        group = heads.query // heads.key
        slopes = [((slope,),) for slope in alibi_slopes(heads.query, max_bias)]
        grouped = tuple(tuple(slopes[g * group : (g + 1) * group]) for g in range(heads.key))
        table = ctx.const((grouped,), TensorType("f32", (1, heads.key, group, 1, 1)), "alibi.slopes")
        at = ctx.emit("cast", key, to="alibi.key", dtype="f32")
        if not rounded:
            return ctx.emit("mul", table, at, to="alibi.bias")
        table, at = (ctx.emit("cast", x, to="alibi.rounded", dtype="bf16") for x in (table, at))
        return ctx.emit("cast", ctx.emit("mul", table, at, to="alibi.product"), to="alibi.bias", dtype="f32")

    return ctx.shared(("alibi", heads, max_bias, rounded), make)  # type: ignore[no-any-return]


def alibi_slopes(heads: int, max_bias: float = 8.0) -> tuple[float, ...]:
    """2^(-b (j+1) / n) for the first n heads, n the largest power of two in `heads`, then 2^(-b (2j+1) / 2n)."""
    n = 2 ** int(math.log2(heads))
    first = [2.0 ** (-max_bias * (j + 1) / n) for j in range(n)]
    return tuple(first + [2.0 ** (-max_bias * (2 * j + 1) / (2 * n)) for j in range(heads - n)])
