"""Parts that act on one token at a time -> equations: embedding, linear, norms, feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compiler.frontend.context import Context
from compiler.ir import Value
from specs import parts as schema
from specs.errors import SpecRTError


def width(x: Value) -> int:
    """The size of the last dim."""
    size = x.type.shape[-1]
    assert isinstance(size, int)  # features are never symbolic
    return size


def linear(ctx: Context, leaf: str, x: Value, out: int, bias: bool) -> Value:
    """x W' + b with W [out, in], the layout that checkpoints use."""
    y = ctx.emit("matmul", x, ctx.weight(leaf, "weight", out, width(x)), to=leaf, transpose_b=True)
    return ctx.emit("add", y, ctx.weight(leaf, "bias", out), to=leaf) if bias else y


def embedding_part(ctx: Context, name: str, part: schema.Embedding, tokens: Value) -> Value:
    """Rows of a table [rows, width]."""
    rows = part.rows.as_int(ctx.env)
    size = ctx.dimension("d_model") if part.width is None else part.width.as_int(ctx.env)
    offset = 0 if part.offset is None else part.offset.as_int(ctx.env)
    index = tokens
    if tokens is ctx.inputs.get("positions"):
        _check_longest(ctx, name, part, rows - offset)
        index = ctx.emit("maximum", index, 0, to=f"{name}.index")  # below 0 is padding, which has a row nobody reads
    if tokens is ctx.inputs.get("ordinals"):  # from 1, and 0 for what is not counted
        _check_longest(ctx, name, part, rows - offset - 1)
    if offset:
        index = ctx.emit("add", index, offset, to=f"{name}.index")
    return ctx.emit("gather", ctx.weight(name, "weight", rows, size), index, to=name)


def _check_longest(ctx: Context, name: str, part: schema.Embedding, positions: int) -> None:
    if ctx.longest > positions:
        message = f"sequences may have {ctx.longest} tokens, but `{name}` has learned {positions} positions"
        raise SpecRTError(
            "SPEC-068", message, where=part.where, hint=f"compile with `max_sequence` {positions} or less"
        )


def linear_part(ctx: Context, name: str, part: schema.Linear, x: Value) -> Value:
    """A linear layer; tied to an embedding, it multiplies with that table."""
    out, tied = part.out.as_int(ctx.env), part.tied
    if tied is not None and tied.when.as_bool(ctx.env):
        weight = ctx.global_weight(tied.to, "weight", out, width(x))
    else:
        weight = ctx.weight(name, "weight", out, width(x))
    if ctx.flag(part.unit_rows):
        weight = unit_rows(ctx, name, weight)
    y = ctx.emit("matmul", x, weight, to=name, transpose_b=True)
    if ctx.flag(part.bias):
        y = ctx.emit("add", y, ctx.weight(name, "bias", out), to=name)
    return y if part.act is None else activate(ctx, name, part.choice("act", ctx.env), y)


def unit_rows(ctx: Context, name: str, weight: Value) -> Value:
    """Each row over its L2 norm, which counts as 1e-12 at least: PyTorch's `normalize`."""
    total = ctx.emit("sum", ctx.emit("mul", weight, weight, to=f"{name}.square"), to=f"{name}.sum")
    scale = ctx.emit("rsqrt", ctx.emit("maximum", total, 1e-24, to=f"{name}.sum"), to=f"{name}.rsqrt")
    return ctx.emit("mul", weight, scale, to=f"{name}.unit")


def gain(ctx: Context, name: str, kind: str, size: int) -> Value:
    """A norm's gain: the weight, or 1 + the weight."""
    weight = ctx.weight(name, "weight", size)
    return weight if kind == "weight" else ctx.emit("add", weight, 1.0, to=f"{name}.gain")


def rms_norm(ctx: Context, name: str, x: Value, eps: float, kind: str) -> Value:
    """x / sqrt(mean(x^2) + eps) * gain (arXiv:1910.07467, eq. 4)."""
    mean = ctx.emit("mean", ctx.emit("mul", x, x, to=f"{name}.square"), to=f"{name}.mean")
    scale = ctx.emit("rsqrt", ctx.emit("add", mean, eps, to=f"{name}.eps"), to=f"{name}.rsqrt")
    normed = ctx.emit("mul", x, scale, to=f"{name}.normed")
    return ctx.emit("mul", normed, gain(ctx, name, kind, width(x)), to=name)


def layer_norm(ctx: Context, name: str, x: Value, eps: float, kind: str, bias: bool) -> Value:
    """(x - mean) / sqrt(var + eps) * gain + bias (arXiv:1607.06450, eq. 4)."""
    centred = ctx.emit("sub", x, ctx.emit("mean", x, to=f"{name}.mean"), to=f"{name}.centred")
    var = ctx.emit("mean", ctx.emit("mul", centred, centred, to=f"{name}.square"), to=f"{name}.var")
    scale = ctx.emit("rsqrt", ctx.emit("add", var, eps, to=f"{name}.eps"), to=f"{name}.rsqrt")
    y = ctx.emit("mul", centred, scale, to=f"{name}.normed")
    if kind != "one":
        y = ctx.emit("mul", y, gain(ctx, name, kind, width(x)), to=name)
    return ctx.emit("add", y, ctx.weight(name, "bias", width(x)), to=name) if bias else y


def rms_norm_part(ctx: Context, name: str, part: schema.RmsNorm, x: Value) -> Value:
    """An RMS norm."""
    return rms_norm(ctx, name, x, part.eps.as_float(ctx.env), ctx.option(part, "gain", "weight"))


def layer_norm_part(ctx: Context, name: str, part: schema.LayerNorm, x: Value) -> Value:
    """A layer norm, or an RMS norm where the mean stays."""
    if part.centre is not None and not ctx.flag(part.centre):
        return rms_norm(ctx, name, x, part.eps.as_float(ctx.env), ctx.option(part, "gain", "weight"))
    return layer_norm(ctx, name, x, part.eps.as_float(ctx.env), ctx.option(part, "gain", "weight"), ctx.flag(part.bias))


# Activation by the name that the schema lists (a test compares them) -> the operation and its attributes.
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "silu": ("silu", {}),
    "relu": ("relu", {}),
    "relu2": ("relu", {}),  # then squared
    "tanh": ("tanh", {}),
    "gelu": ("gelu", {"approximate": False}),
    "gelu_tanh": ("gelu", {"approximate": True}),
}


def activate(ctx: Context, name: str, act: str, x: Value) -> Value:
    """An activation function by the name that the schema lists."""
    op, attrs = ACTIVATIONS[act]
    y = ctx.emit(op, x, to=f"{name}.act", **attrs)
    return ctx.emit("mul", y, y, to=f"{name}.squared") if act == "relu2" else y  # arXiv:2109.08668


def mlp_part(ctx: Context, name: str, part: schema.Mlp, x: Value) -> Value:
    """down(act(up x))."""
    bias = ctx.flag(part.bias)
    up = linear(ctx, f"{name}.up", x, part.d_ffn.as_int(ctx.env), bias)
    return linear(ctx, f"{name}.down", activate(ctx, name, part.choice("act", ctx.env), up), width(x), bias)


def gated_mlp_part(ctx: Context, name: str, part: schema.GatedMlp, x: Value) -> Value:
    """down(act(gate x) * up x) (arXiv:2002.05202)."""
    size, bias = part.d_ffn.as_int(ctx.env), ctx.flag(part.bias)
    gate = linear(ctx, f"{name}.gate", x, size, bias)
    up = linear(ctx, f"{name}.up", x, size, bias)
    hidden = ctx.emit("mul", activate(ctx, name, part.choice("act", ctx.env), gate), up, to=f"{name}.hidden")
    return linear(ctx, f"{name}.down", hidden, width(x), bias)


PartBuilder = Callable[[Context, str, Any, Value], Value]
