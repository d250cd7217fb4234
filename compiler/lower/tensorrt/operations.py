"""How each operation is written as TensorRT layers."""

from __future__ import annotations

from functools import partial
from math import pi, sqrt

import numpy as np

from compiler.ir.core import Equation, Value
from compiler.ir.types import Shape, TensorType
from compiler.lower.tensorrt.emitter import Emitter, Tensor, attr_float, attr_int, emits
from compiler.lower.tensorrt.quantized import product

_BINARY = {
    "add": "SUM", "sub": "SUB", "mul": "PROD", "div": "DIV", "maximum": "MAX", "minimum": "MIN", "and": "AND",
    "or": "OR",
}  # fmt: skip
_COMPARE = {"lt": ("LESS", False), "gt": ("GREATER", False), "eq": ("EQUAL", False)}
_COMPARE |= {"ge": ("LESS", True), "le": ("GREATER", True), "ne": ("EQUAL", True)}


def operands(e: Emitter, equation: Equation) -> tuple[list[Tensor], str]:
    """The operands aligned to the result's rank, literals as constants, and the type of those beside."""
    rank = equation.result.type.rank
    first = next(arg.type for arg in reversed(equation.values))  # `where`: the condition comes first
    like = TensorType(first.dtype, (1,) * rank)
    tensors = [
        e.aligned(e.scope[arg.name], arg.type.shape, rank, arg.type.dtype) if isinstance(arg, Value)
        else e.tensor(arg, like)
        for arg in equation.args
    ]  # fmt: skip
    return tensors, first.dtype


@emits(*_BINARY)
def binary(e: Emitter, equation: Equation) -> Tensor:
    (a, b), dtype = operands(e, equation)
    return e.elementwise(_BINARY[equation.op], a, b, dtype)


@emits("compare")
def compare(e: Emitter, equation: Equation) -> Tensor:
    (a, b), dtype = operands(e, equation)
    op, negated = _COMPARE[str(equation.attr["kind"])]
    found = e.elementwise(op, a, b, dtype, "not" if negated else "", result="bool")
    return e.unary("NOT", found, "bool") if negated else found


@emits("where")
def where(e: Emitter, equation: Equation) -> Tensor:
    dtype = equation.result.type.dtype
    (condition, a, b), _ = operands(e, equation)
    return e.out(e.network.add_select(condition, a, b), dtype)


@emits("exp", "cos", "sin", "erf")
def unary(e: Emitter, equation: Equation) -> Tensor:
    return e.unary(equation.op.upper(), _x(e, equation), equation.result.type.dtype)


@emits("rsqrt")
def rsqrt(e: Emitter, equation: Equation) -> Tensor:
    dtype = equation.result.type.dtype
    return e.unary("RECIP", e.unary("SQRT", _x(e, equation), dtype, "sqrt"), dtype)


@emits("tanh", "sigmoid", "relu")
def activation(e: Emitter, equation: Equation) -> Tensor:
    return e.activation(equation.op.upper(), _x(e, equation), equation.result.type.dtype)


@emits("silu")
def silu(e: Emitter, equation: Equation) -> Tensor:
    x, dtype = _x(e, equation), equation.result.type.dtype
    return e.elementwise("PROD", x, e.activation("SIGMOID", x, dtype, "sigmoid"), dtype)


@emits("gelu")
def gelu(e: Emitter, equation: Equation) -> Tensor:
    x, kind = _x(e, equation), equation.result.type
    tanh = equation.attr["approximate"] is True
    if e.dialect.gelu:
        return e.activation("GELU_TANH" if tanh else "GELU_ERF", x, kind.dtype)
    wide = e.cast(x, kind.dtype, "f32")

    def times(a: Tensor, number: float) -> Tensor:
        return e.elementwise("PROD", a, e.scalar(number, "f32", kind.rank), "f32", "scale")

    if tanh:
        cube = e.elementwise("PROD", e.elementwise("PROD", wide, wide, "f32", "square"), wide, "f32", "cube")
        inner = e.elementwise("SUM", wide, times(cube, 0.044715), "f32", "inner")
        turned = e.activation("TANH", times(inner, sqrt(2 / pi)), "f32", "tanh")
    else:
        turned = e.unary("ERF", times(wide, sqrt(0.5)), "f32", "erf")
    gate = e.elementwise("SUM", turned, e.scalar(1.0, "f32", kind.rank), "f32", "gate")
    return e.cast(e.elementwise("PROD", times(wide, 0.5), gate, "f32", "gelu"), "f32", kind.dtype)


@emits("cast")
def cast(e: Emitter, equation: Equation) -> Tensor:
    source, target = equation.values[0].type.dtype, equation.result.type.dtype
    return e.cast(_x(e, equation), source, target)


@emits("matmul")
def matmul(e: Emitter, equation: Equation) -> Tensor:
    a, b = equation.values
    kind = equation.result.type
    if a.name in e.operands or b.name in e.operands:
        return product(e, equation)
    left, right = (e.aligned(e.scope[value.name], value.type.shape, kind.rank, kind.dtype) for value in (a, b))
    plain, turned = e.trt.MatrixOperation.NONE, e.trt.MatrixOperation.TRANSPOSE
    transpose = equation.attr.get("transpose_b", False) is True
    layer = e.network.add_matrix_multiply(left, plain, right, turned if transpose else plain)
    return e.out(layer, kind.dtype)


@emits("gather")
def gather(e: Emitter, equation: Equation) -> Tensor:
    (table, index), kind = equation.values, equation.result.type
    rows, tail = e.scope[table.name], kind.shape[index.type.rank :]
    if equation.attr.get("dims", 1) != 1:
        rows = e.reshape(rows, table.type.shape, ("rows", *tail), kind.dtype, "flat")
    return e.out(e.network.add_gather(rows, e.scope[index.name], 0), kind.dtype)


@emits("mean", "sum")
def reduce(e: Emitter, equation: Equation) -> Tensor:
    kind = equation.result.type
    return e.mean(_x(e, equation), kind.rank, kind.dtype, op="AVG" if equation.op == "mean" else "SUM")


@emits("softmax")
def softmax(e: Emitter, equation: Equation) -> Tensor:
    kind = equation.result.type
    wide = e.cast(_x(e, equation), kind.dtype, "f32")
    sink = equation.args[1] if len(equation.args) > 1 else None
    if not isinstance(sink, Value):
        return e.cast(softmaxed(e, wide, kind.rank), "f32", kind.dtype)
    logit = e.cast(e.aligned(e.scope[sink.name], sink.type.shape, kind.rank, kind.dtype), kind.dtype, "f32")
    return e.cast(with_sink(e, wide, kind.shape, logit), "f32", kind.dtype)


def softmaxed(e: Emitter, x: Tensor, rank: int) -> Tensor:
    """Softmax over the last dim of a float32 tensor."""
    layer = e.network.add_softmax(x)
    layer.axes = 1 << (rank - 1)
    return e.out(layer, "f32", "softmax")


def with_sink(e: Emitter, scores: Tensor, shape: Shape, logit: Tensor) -> Tensor:
    """Softmax of finite float32 scores over the last dim, one more logit for each row joined and dropped."""
    last = len(shape) - 1
    # broadcast to one column: concatenation does not, and a product with 0 is exact
    column = e.slice(scores, shape, last, 0, 1, "f32", "column")
    zeros = e.elementwise("PROD", column, e.scalar(0.0, "f32", len(shape)), "f32", "column")
    joined = e.concat([scores, e.elementwise("SUM", zeros, logit, "f32", "column")], last, "f32", "with_sink")
    weights = softmaxed(e, joined, len(shape))
    sizes = tuple(dim if isinstance(dim, int) else 1 for dim in shape)
    layer = e.network.add_slice(weights, (0,) * len(shape), sizes, (1,) * len(shape))
    if any(isinstance(dim, str) for dim in shape):
        layer.set_input(2, e.size(shape))
    return e.out(layer, "f32", "without_sink")


@emits("reshape")
def reshape(e: Emitter, equation: Equation) -> Tensor:
    source, target = equation.values[0].type, equation.result.type
    return e.reshape(_x(e, equation), source.shape, target.shape, target.dtype)


@emits("transpose")
def transpose(e: Emitter, equation: Equation) -> Tensor:
    kind, axes = equation.result.type, equation.attr["axes"]
    assert isinstance(axes, tuple)  # C4
    order = [*range(kind.rank - len(axes)), *(int(str(axis)) % kind.rank for axis in axes)]
    return transposed(e, _x(e, equation), order, kind.dtype)


def transposed(e: Emitter, x: Tensor, order: list[int], dtype: str, what: str = "") -> Tensor:
    """x with its dims permuted: new dim j is old dim order[j]."""
    layer = e.network.add_shuffle(x)
    layer.first_transpose = tuple(order)
    return e.out(layer, dtype, what)


@emits("concat")
def concat(e: Emitter, equation: Equation) -> Tensor:
    kind = equation.result.type
    parts = [e.scope[value.name] for value in equation.values]
    return e.concat(parts, attr_int(equation, "axis") % kind.rank, kind.dtype)


@emits("slice")
def slice_(e: Emitter, equation: Equation) -> Tensor:
    kind, source = equation.result.type, equation.values[0].type.shape
    start, stop, axis = (attr_int(equation, name) for name in ("start", "stop", "axis"))
    return e.slice(_x(e, equation), source, axis % kind.rank, start, stop, kind.dtype)


@emits("rms_norm")
def rms_norm(e: Emitter, equation: Equation) -> Tensor:
    x, kind = _x(e, equation), equation.result.type
    return _scaled(e, equation, _normed(e, e.cast(x, kind.dtype, "f32"), kind.rank, attr_float(equation, "eps")))


@emits("layer_norm")
def layer_norm(e: Emitter, equation: Equation) -> Tensor:
    x, kind, eps = _x(e, equation), equation.result.type, attr_float(equation, "eps")
    if e.dialect.normalization is not None:
        weight, bias = _row(e, equation, 1, 1.0), _row(e, equation, 2, 0.0)
        method = getattr(e.network, e.dialect.normalization)
        layer = method(x, weight, bias, 1 << (kind.rank - 1))
        layer.epsilon = eps
        return e.out(layer, kind.dtype)
    wide = e.cast(x, kind.dtype, "f32")
    centred = e.elementwise("SUB", wide, e.mean(wide, kind.rank, "f32", "mean"), "f32", "centred")
    scaled = _scaled(e, equation, _normed(e, centred, kind.rank, eps))
    if not _given(equation, 2):
        return scaled
    return e.elementwise("SUM", scaled, _row(e, equation, 2, 0.0), kind.dtype, "bias")


def _normed(e: Emitter, x: Tensor, rank: int, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) of a float32 tensor."""
    square = e.elementwise("PROD", x, x, "f32", "square")
    spread = e.elementwise("SUM", e.mean(square, rank, "f32", "mean_square"), e.scalar(eps, "f32", rank), "f32", "eps")
    return e.elementwise("DIV", x, e.unary("SQRT", spread, "f32", "sqrt"), "f32", "normed")


def _scaled(e: Emitter, equation: Equation, normed: Tensor) -> Tensor:
    dtype = equation.result.type.dtype
    rounded = e.cast(normed, "f32", dtype)
    return e.elementwise("PROD", rounded, _row(e, equation, 1, 1.0), dtype) if _given(equation, 1) else rounded


def _given(equation: Equation, index: int) -> bool:
    return index < len(equation.args) and isinstance(equation.args[index], Value)


def _row(e: Emitter, equation: Equation, index: int, default: float) -> Tensor:
    """A vector operand [M] as [1,..,M]; one that is left out is `default` everywhere."""
    kind = equation.result.type
    arg = equation.args[index] if index < len(equation.args) else None
    if isinstance(arg, Value):
        return e.aligned(e.scope[arg.name], arg.type.shape, kind.rank, kind.dtype)
    row: Shape = (*(1,) * (kind.rank - 1), kind.shape[-1])
    make = partial(np.full, [int(dim) for dim in row], default)
    return e.memo(("row", default, row, kind.dtype), lambda: e.constant(make(), kind.dtype))


def _x(e: Emitter, equation: Equation) -> Tensor:
    return e.scope[equation.values[0].name]
