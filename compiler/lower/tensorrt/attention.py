"""Rotation and attention inside an engine: what the attention kernel does not take over, and encoders."""

from __future__ import annotations

from dataclasses import dataclass

from compiler.ir.core import Equation, Value
from compiler.ir.types import Dim, Shape
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
    if e.dialect.rotary and kind.rank in (3, 4):
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
    """By TensorRT's layer, which takes [B,H,S,D]: packed tokens are a batch of T sequences of one token each, so that
    every token has a row of its own in the tables.
    """
    x, cos, sin = equation.values
    half = int(cos.type.shape[-1])
    if x.type.rank == 4:
        batch = transposed(e, wide, [0, 2, 1, 3], "f32", "heads")
        tables = [e.scope[value.name] for value in (cos, sin)]
    else:
        tokens, heads, dim = x.type.shape
        batch = e.reshape(wide, x.type.shape, (tokens, heads, 1, dim), "f32", "tokens")
        tables = [_table(e, value, (tokens, 1, half)) for value in (cos, sin)]
    layer = e.network.add_rotary_embedding(batch, *tables, interleaved, 2 * half)
    turned = e.out(layer, "f32", "rotary")
    if x.type.rank == 4:
        return transposed(e, turned, [0, 2, 1, 3], "f32", "rows")
    return e.reshape(turned, (tokens, heads, 1, dim), x.type.shape, "f32", "rows")


@dataclass(frozen=True)
class Keys:
    """What queries attend to, in float32: keys and values [B,K,(1),P,D], and where the keys are, [B or 1,1,(1),1,P]."""

    keys: Tensor
    values: Tensor
    at: Tensor
    count: Dim


def by_equations(e: Emitter, equation: Equation) -> Tensor:
    """The operation `attention` as products, mask and softmax."""
    q, k, v, positions = equation.values[:4]
    batch, length, groups, _ = k.type.shape
    lead = lead_of(q, int(groups))
    inner = (int(groups), *(1,) * (len(lead) - 1))
    place = e.reshape(
        e.scope[positions.name], (batch, length), (batch, *(1,) * len(lead), 1, length), "i32", "keys"
    )  # fmt: skip
    return attended(e, equation, lead, Keys(_headed(e, k, inner), _headed(e, v, inner), place, length))


def lead_of(q: Value, groups: int) -> Shape:
    """The dims of the heads: of the key heads, and of the query heads that share each where there are several."""
    heads = int(q.type.shape[-2])
    return (groups,) if groups == heads else (groups, heads // groups)


def _headed(e: Emitter, value: Value, inner: Shape) -> Tensor:
    """[B,S,H,D] as [B,K,(G),S,D], float32."""
    batch, length, _, dim = value.type.shape
    shape: Shape = (batch, length, *inner, dim)
    x = e.reshape(e.scope[value.name], value.type.shape, shape, value.type.dtype, "heads")
    order = [0, *range(2, 2 + len(inner)), 1, len(shape) - 1]
    return e.cast(transposed(e, x, order, value.type.dtype, "heads"), value.type.dtype, "f32")


def attended(e: Emitter, equation: Equation, lead: Shape, keys: Keys) -> Tensor:
    """Attention of the first operand by products, mask and softmax in float32, with all that the attributes ask for.

    Operands 3 to 5 are the queries' positions, and prefix and sinks where there are any.
    """
    q, positions = equation.values[0], equation.values[3]
    batch, length, heads, wide = equation.result.type.shape
    rank = 3 + len(lead)
    plain, turned = e.trt.MatrixOperation.NONE, e.trt.MatrixOperation.TRANSPOSE
    scores = e.out(e.network.add_matrix_multiply(_headed(e, q, lead), plain, keys.keys, turned), "f32", "scores")
    scores = e.elementwise("PROD", scores, e.scalar(attr_float(equation, "scale"), "f32", rank), "f32", "scaled")
    if equation.attr.get("softcap") is not None:
        cap = e.scalar(attr_float(equation, "softcap"), "f32", rank)
        capped = e.activation("TANH", e.elementwise("DIV", scores, cap, "f32", "softcap"), "f32", "softcap")
        scores = e.elementwise("PROD", capped, cap, "f32", "softcap")
    slopes = slopes_of(e, equation, (1, *lead, 1, 1))
    if slopes is not None:
        bias = e.elementwise("PROD", e.cast(keys.at, "i32", "f32"), slopes, "f32", "bias")
        scores = e.elementwise("SUM", scores, bias, "f32", "biased")
    ones: Shape = (1,) * len(lead)
    at = e.reshape(e.scope[positions.name], (batch, length), (batch, *ones, length, 1), "i32", "at")
    seen = mask(e, equation, at, keys.at, rank)
    scores = e.out(e.network.add_select(seen, scores, e.scalar(LOWEST, "f32", rank)), "f32", "masked")
    weights = _weights(e, equation, scores, (batch, *lead, length, keys.count))
    out = e.out(e.network.add_matrix_multiply(weights, plain, keys.values, plain), "f32", "out")
    back = transposed(e, out, [0, rank - 2, *range(1, 1 + len(lead)), rank - 1], "f32", "rows")
    joined = e.reshape(back, (batch, length, *lead, wide), (batch, length, heads, wide), "f32", "joined")
    return e.cast(joined, "f32", equation.result.type.dtype)


def slopes_of(e: Emitter, equation: Equation, shape: Shape) -> Tensor | None:
    """The slopes of linear biases under a shape, float32; None where there are none."""
    slopes = equation.attr.get("slopes")
    if not isinstance(slopes, tuple):
        return None
    table = e.constant([float(str(number)) for number in slopes], "f32")
    return e.reshape(table, (len(slopes),), shape, "f32", "slopes")


def mask(e: Emitter, equation: Equation, at: Tensor, keys: Tensor, rank: int) -> Tensor:
    """Which keys at `keys` each query at `at` sees: bool [B,1,(1),S,P]."""

    def compare(op: str, a: Tensor, b: Tensor, *, negated: bool = False) -> Tensor:
        found = e.elementwise(op, a, b, "i32", "sees", result="bool")
        return e.unary("NOT", found, "bool", "sees") if negated else found

    def both(a: Tensor, b: Tensor, op: str = "AND") -> Tensor:
        return e.elementwise(op, a, b, "bool", "sees")

    found = compare("LESS", keys, e.scalar(0, "i32", rank), negated=True)
    if equation.attr.get("causal", True) is True:  # over a cache every attention is
        seen = compare("GREATER", keys, at, negated=True)
        prefix = optional(equation, 4)
        if prefix is not None:
            row: Shape = (*prefix.type.shape, *(1,) * (rank - 1))
            before = e.reshape(e.scope[prefix.name], prefix.type.shape, row, "i32", "prefix")
            seen = both(seen, compare("LESS", keys, before), "OR")
        found = both(found, seen)
    window = equation.attr.get("window")
    if isinstance(window, int):
        distance = e.elementwise("SUB", at, keys, "i32", "distance")
        found = both(found, compare("LESS", distance, e.scalar(window, "i32", rank)))
    return found


def optional(equation: Equation, index: int) -> Value | None:
    """An operand that may be left out."""
    arg = equation.args[index] if index < len(equation.args) else None
    return arg if isinstance(arg, Value) else None


def _weights(e: Emitter, equation: Equation, scores: Tensor, shape: Shape) -> Tensor:
    """The softmax over keys, with a sink's logit joined and dropped."""
    rank = len(shape)
    sinks = optional(equation, 5)
    if sinks is None:
        return softmaxed(e, scores, rank)
    logits = e.cast(e.scope[sinks.name], sinks.type.dtype, "f32")
    return with_sink(e, scores, shape, e.reshape(logits, sinks.type.shape, (1, *shape[1:-2], 1, 1), "f32", "sinks"))
