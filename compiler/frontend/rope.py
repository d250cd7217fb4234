"""Rotary embeddings -> equations: frequencies are constants, cosines and sines are made once for all layers."""

from __future__ import annotations

from collections.abc import Iterable

from compiler.frontend.block_rope import block_streams
from compiler.frontend.context import Context
from compiler.ir import TensorType, Value
from specs import positions
from specs.errors import SpecRTError, Where
from specs.rope import Frequencies, inv_freq


def rotate(ctx: Context, name: str, rope: positions.Rope, x: Value) -> Value:
    """x [B,S,heads,D] turned by its positions; raises SPEC-050 to SPEC-056."""
    env = ctx.env
    scaling = None if rope.scaling is None else rope.scaling.value(env)
    context = None if rope.context is None else rope.context.as_int(env)
    original = None if rope.original is None else rope.original.value(env)
    dims, theta = rope.dims.as_int(env), rope.theta.as_float(env)
    if dims == 0:
        return x

    def make() -> tuple[Value, Value]:
        found = inv_freq(dims, theta, scaling, context, rope.where, original)
        positions = ctx.input("positions", "i32", "B", "S")
        return _tables(ctx, positions, _frequencies(ctx, found, rope.where), found.multiplier)

    cos, sin = ctx.shared(("rope", dims, theta, repr(scaling), context, original), make)
    return ctx.emit("rotate", x, cos, sin, to=f"{name}.rotated", style=ctx.option(rope, "style"))


def rotate_block(ctx: Context, name: str, rope: positions.BlockRope, x: Value) -> Value:
    """Each position stream turns its equal share of the dims."""
    streams = block_streams(ctx, rope.streams.as_int(ctx.env))
    dims, theta, style = rope.dims.as_int(ctx.env), rope.theta.as_float(ctx.env), ctx.option(rope, "style")
    frequencies = inv_freq(dims, theta, None, None, rope.where).short
    if ctx.option(rope, "stored", "f32") == "f16":
        frequencies = frequencies.astype("float16")
    width, turned = int(x.type.shape[-1]) // len(streams), []
    for number, stream in enumerate(streams):

        def make(stream: Value = stream) -> tuple[Value, Value]:
            return _tables(ctx, stream, _constant(ctx, frequencies, "rope.freq"), 1.0)

        cos, sin = ctx.shared(("block_rope", stream.name, dims, theta), make)
        share = x
        if len(streams) > 1:
            start = number * width
            share = ctx.emit("slice", x, to=f"{name}.share", axis=-1, start=start, stop=start + width)
        turned.append(ctx.emit("rotate", share, cos, sin, to=f"{name}.rotated", style=style))
    return turned[0] if len(turned) == 1 else ctx.emit("concat", *turned, to=f"{name}.rotated", axis=-1)


def _tables(ctx: Context, positions: Value, freq: Value, multiplier: float) -> tuple[Value, Value]:
    """Cosines and sines f32[B,S,dims/2] of positions i32[B,S] times frequencies, f32[dims/2] or [B,S,dims/2]."""
    at = ctx.emit("cast", positions, to="rope.at", dtype="f32")
    angle = ctx.emit("mul", ctx.emit("reshape", at, to="rope.at", shape=("B", "S", 1)), freq, to="rope.angle")
    cos, sin = ctx.emit("cos", angle, to="rope.cos"), ctx.emit("sin", angle, to="rope.sin")
    if multiplier != 1.0:
        cos = ctx.emit("mul", cos, multiplier, to="rope.cos")
        sin = ctx.emit("mul", sin, multiplier, to="rope.sin")
    return cos, sin


def _frequencies(ctx: Context, found: Frequencies, where: Where) -> Value:
    """One vector for all tokens; where longer sequences have another, each token has that of its own sequence."""
    short = _constant(ctx, found.short, "rope.freq")
    if found.limit is None or ctx.longest <= found.limit:
        return short
    if found.beyond is None:
        raise SpecRTError(
            "SPEC-056",
            f"rope type `{found.kind}` is only supported up to the {found.limit} tokens that the model was trained "
            f"for, and sequences of {ctx.longest} are asked for",
            where=where,
            hint=f"compile with `max_sequence` of {found.limit} or less",
        )
    # By the token's own sequence, not by the batch: a row gives the same whatever runs beside it.
    lengths = ctx.input("lengths", "i32", "B", "S")
    long = ctx.emit("compare", lengths, found.limit, to="rope.long", kind="gt")
    long = ctx.emit("reshape", long, to="rope.long", shape=("B", "S", 1))
    return ctx.emit("where", long, _constant(ctx, found.beyond, "rope.beyond"), short, to="rope.freq")


def _constant(ctx: Context, numbers: Iterable[float], to: str) -> Value:
    values = tuple(float(number) for number in numbers)
    return ctx.const(values, TensorType("f32", (len(values),)), to)
