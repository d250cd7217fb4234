"""Latent attention -> plain equations: keys and values from one small latent, one rotated key for all heads."""

from __future__ import annotations

import math

from compiler.frontend.attention import Heads, attention_mask, grouped, head_rows, mix
from compiler.frontend.context import Context
from compiler.frontend.parts import linear, rms_norm, width
from compiler.frontend.rope import rotate
from compiler.ir import TensorType, Value
from specs import parts as schema
from specs import positions


def latent_attention_part(ctx: Context, name: str, part: schema.LatentAttention, x: Value) -> Value:
    """Self-attention of x [B,S,M] (arXiv:2405.04434, section 2.1.2), keys and values written out for each head."""
    env, bias, eps = ctx.env, ctx.flag(part.bias), part.eps.as_float(ctx.env)
    heads, plain, turned = part.heads.as_int(env), part.d_nope.as_int(env), part.d_rope.as_int(env)
    q_rank = None if part.q_rank is None else part.q_rank.value(env)
    source = x
    if q_rank is not None:
        source = rms_norm(ctx, f"{name}.q_norm", linear(ctx, f"{name}.q_a", x, int(q_rank), bias), eps, "weight")
    latent = linear(ctx, f"{name}.kv_a", x, part.kv_rank.as_int(env), bias)
    latent = rms_norm(ctx, f"{name}.kv_norm", latent, eps, "weight")

    def rows(leaf: str, of: Value, count: int, size: int, with_bias: bool = False) -> Value:
        return head_rows(ctx, f"{name}.{leaf}", linear(ctx, f"{name}.{leaf}", of, count * size, with_bias), count)

    q_rope, k_rope = rows("q_rope", source, heads, turned), rows("k_rope", x, 1, turned, bias)
    if isinstance(part.position, positions.Rope):
        q_rope, k_rope = rotate(ctx, name, part.position, q_rope), rotate(ctx, name, part.position, k_rope)
    ones = ctx.shared(("ones", heads), lambda: ctx.const(((1.0,),) * heads, TensorType("f32", (heads, 1)), "ones"))
    shared = ctx.emit("mul", k_rope, ones, to=f"{name}.k_rope.all")
    q = ctx.emit("concat", rows("q_nope", source, heads, plain), q_rope, to=f"{name}.q", axis=-1)
    k = ctx.emit("concat", rows("k_nope", latent, heads, plain), shared, to=f"{name}.k", axis=-1)
    v = rows("v", latent, heads, part.d_v.as_int(env))
    scale = part.scale.as_float(env) if part.scale is not None else 1.0 / math.sqrt(plain + turned)
    queries, keys = (grouped(ctx, f"{name}.{letter}", value, heads, 1) for letter, value in (("q", q), ("k", k)))
    scores = ctx.emit("matmul", queries, keys, to=f"{name}.scores", transpose_b=True)
    scores = ctx.emit("mul", scores, scale, to=f"{name}.scaled")
    joined = mix(ctx, name, scores, attention_mask(ctx, part), v, Heads(heads, heads, plain + turned), None)
    return linear(ctx, f"{name}.o", joined, width(x), bias)
