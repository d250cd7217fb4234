"""Rotation and attention inside an engine: what the attention kernel does not take over, and encoders."""

from __future__ import annotations

from compiler.ir.core import Equation, Value
from compiler.ir.types import Shape
from compiler.lower.tensorrt.emitter import Emitter, Tensor, attr_float, emits
from compiler.lower.tensorrt.operations import softmaxed, transposed, with_sink

LOWEST = -3.4028234663852886e38  # of float32: what a masked score becomes


@emits("rotate")
def rotate(e: Emitter, equation: Equation) -> Tensor:
    x, cos, sin = equation.values
    kind, pairs = equation.result.type, x.type.with_dtype("f32")
    half = int(cos.type.shape[-1])
    wide = e.cast(e.scope[x.name], kind.dtype, "f32")
    interleaved = equation.attr["style"] == "interleaved"
    if e.dialect.rotary and kind.rank == 3:
        return e.cast(_native(e, equation, wide, interleaved), "f32", kind.dtype)
    axis, step = kind.rank - 1, 2 if interleaved else 1
    starts = (0, 1 if interleaved else half)
    a, b = (e.strided(wide, pairs.shape, axis, start, half, step, "f32", "pair") for start in starts)
    c, s = (_table(e, value, (*cos.type.shape[:-1], 1, half)) for value in (cos, sin))

    def combined(op: str, x1: Tensor, t1: Tensor, x2: Tensor, t2: Tensor) -> Tensor:
        first = e.elementwise("PROD", x1, t1, "f32", "turned")
        return e.elementwise(op, first, e.elementwise("PROD", x2, t2, "f32", "turned"), "f32", "turned")

    turned = [combined("SUB", a, c, b, s), combined("SUM", b, c, a, s)]
    if interleaved:
        shape: Shape = (*kind.shape[:-1], half, 1)
        columns = [e.reshape(part, (*kind.shape[:-1], half), shape, "f32", "column") for part in turned]
        joined = e.concat(columns, kind.rank, "f32", "columns")
        turned = [e.reshape(joined, (*shape[:-1], 2), (*kind.shape[:-1], 2 * half), "f32", "pairs")]
    parts = [e.cast(part, "f32", kind.dtype) for part in turned]
    if 2 * half < int(kind.shape[-1]):
        parts.append(e.slice(e.scope[x.name], kind.shape, axis, 2 * half, int(kind.shape[-1]), kind.dtype, "rest"))
    return parts[0] if len(parts) == 1 else e.concat(parts, axis, kind.dtype)


def _table(e: Emitter, value: Value, shape: Shape) -> Tensor:
    """A table under another shape, once for all rotations that read it."""
    return e.memo(
        ("table", value.name, shape), lambda: e.reshape(e.scope[value.name], value.type.shape, shape, "f32", "table")
    )


def _native(e: Emitter, equation: Equation, wide: Tensor, interleaved: bool) -> Tensor:
    """As [T,H,1,D], a batch of T sequences of one token each: so every token has a row of its own in the tables."""
    x, cos, sin = equation.values
    tokens, heads, dim = x.type.shape
    half = int(cos.type.shape[-1])
    batch = e.reshape(wide, x.type.shape, (tokens, heads, 1, dim), "f32", "tokens")
    tables = [_table(e, value, (tokens, 1, half)) for value in (cos, sin)]
    layer = e.network.add_rotary_embedding(batch, *tables, interleaved, 2 * half)
    return e.reshape(e.out(layer, "f32", "rotary"), (tokens, heads, 1, dim), x.type.shape, "f32", "rows")


@emits("attention")
def attention(e: Emitter, equation: Equation) -> Tensor:
    q, k, v, positions = equation.values[:4]
    heads, groups = int(q.type.shape[-2]), int(k.type.shape[-2])
    lead: Shape = (groups,) if groups == heads else (groups, heads // groups)
    batch, length, _, wide = equation.result.type.shape
    rank = 3 + len(lead)

    def headed(value: Value, inner: Shape) -> Tensor:
        """[B,S,H,D] as [B,K,(G),S,D], float32."""
        shape: Shape = (batch, length, *inner, value.type.shape[-1])
        x = e.reshape(e.scope[value.name], value.type.shape, shape, value.type.dtype, "heads")
        order = [0, *range(2, 2 + len(inner)), 1, rank - 1]
        return e.cast(transposed(e, x, order, value.type.dtype, "heads"), value.type.dtype, "f32")

    query = headed(q, lead)
    key, values = (headed(value, (groups, *(1,) * (len(lead) - 1))) for value in (k, v))
    plain, turned = e.trt.MatrixOperation.NONE, e.trt.MatrixOperation.TRANSPOSE
    scores = e.out(e.network.add_matrix_multiply(query, plain, key, turned), "f32", "scores")
    scores = e.elementwise("PROD", scores, e.scalar(attr_float(equation, "scale"), "f32", rank), "f32", "scaled")
    if equation.attr.get("softcap") is not None:
        cap = e.scalar(attr_float(equation, "softcap"), "f32", rank)
        capped = e.activation("TANH", e.elementwise("DIV", scores, cap, "f32", "softcap"), "f32", "softcap")
        scores = e.elementwise("PROD", capped, cap, "f32", "softcap")
    ones: Shape = (1,) * len(lead)
    place = e.scope[positions.name]
    at = e.reshape(place, (batch, length), (batch, *ones, length, 1), "i32", "at")
    keys = e.reshape(place, (batch, length), (batch, *ones, 1, length), "i32", "keys")
    slopes = equation.attr.get("slopes")
    if isinstance(slopes, tuple):
        slope = e.constant([float(str(number)) for number in slopes], "f32")
        slope = e.reshape(slope, (heads,), (1, *lead, 1, 1), "f32", "slopes")
        bias = e.elementwise("PROD", e.cast(keys, "i32", "f32"), slope, "f32", "bias")
        scores = e.elementwise("SUM", scores, bias, "f32", "biased")
    seen = _mask(e, equation, at, keys, (batch, *ones, 1, 1), rank)
    lowest = e.scalar(LOWEST, "f32", rank)
    scores = e.out(e.network.add_select(seen, scores, lowest), "f32", "masked")
    weights = _weights(e, equation, scores, (batch, *lead, length, length))
    out = e.out(e.network.add_matrix_multiply(weights, plain, values, plain), "f32", "out")
    back = transposed(e, out, [0, rank - 2, *range(1, 1 + len(lead)), rank - 1], "f32", "rows")
    joined = e.reshape(back, (batch, length, *lead, wide), (batch, length, heads, wide), "f32", "joined")
    return e.cast(joined, "f32", equation.result.type.dtype)


def _mask(e: Emitter, equation: Equation, at: Tensor, keys: Tensor, row: Shape, rank: int) -> Tensor:
    """Which keys each query sees: bool [B,1,(1),S,S]."""

    def compare(op: str, a: Tensor, b: Tensor, *, negated: bool = False) -> Tensor:
        found = e.elementwise(op, a, b, "i32", "sees", result="bool")
        return e.unary("NOT", found, "bool", "sees") if negated else found

    def both(a: Tensor, b: Tensor, op: str = "AND") -> Tensor:
        return e.elementwise(op, a, b, "bool", "sees")

    mask = compare("LESS", keys, e.scalar(0, "i32", rank), negated=True)
    if equation.attr["causal"] is True:
        seen = compare("GREATER", keys, at, negated=True)
        prefix = equation.args[4] if len(equation.args) > 4 else None
        if isinstance(prefix, Value):
            before = e.reshape(e.scope[prefix.name], prefix.type.shape, row, "i32", "prefix")
            seen = both(seen, compare("LESS", keys, before), "OR")
        mask = both(mask, seen)
    window = equation.attr.get("window")
    if isinstance(window, int):
        distance = e.elementwise("SUB", at, keys, "i32", "distance")
        mask = both(mask, compare("LESS", distance, e.scalar(window, "i32", rank)))
    return mask


def _weights(e: Emitter, equation: Equation, scores: Tensor, shape: Shape) -> Tensor:
    """The softmax over keys, with a sink's logit joined and dropped."""
    rank = len(shape)
    sinks = equation.args[5] if len(equation.args) > 5 else None
    if not isinstance(sinks, Value):
        return softmaxed(e, scores, rank)
    logits = e.cast(e.scope[sinks.name], sinks.type.dtype, "f32")
    return with_sink(e, scores, shape, e.reshape(logits, sinks.type.shape, (1, *shape[1:-2], 1, 1), "f32", "sinks"))
