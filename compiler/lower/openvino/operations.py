"""How each operation but attention is written in OpenVINO's opset."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as ops

from compiler.ir.core import Equation, Value
from compiler.ir.types import TensorType
from compiler.lower.openvino.emitter import HELD, Emitter, element, emits, identity
from compiler.lower.openvino.stored import Stored

_UNARY = {
    "exp": ops.exp, "cos": ops.cos, "sin": ops.sin, "tanh": ops.tanh, "erf": ops.erf, "sigmoid": ops.sigmoid,
    "relu": ops.relu, "silu": ops.swish,
}  # fmt: skip
_BINARY = {
    "add": ops.add, "sub": ops.subtract, "mul": ops.multiply, "div": ops.divide, "maximum": ops.maximum,
    "minimum": ops.minimum, "and": ops.logical_and, "or": ops.logical_or,
}  # fmt: skip
_COMPARE = {
    "lt": ops.less, "le": ops.less_equal, "gt": ops.greater, "ge": ops.greater_equal, "eq": ops.equal,
    "ne": ops.not_equal,
}  # fmt: skip


def shape_of(value: Value | TensorType) -> tuple[int | str, ...]:
    """The dims of a value."""
    return value.shape if isinstance(value, TensorType) else value.type.shape


def operand(equation: Equation, index: int) -> Value:
    """An operand that the type rule says is a value."""
    value = equation.args[index]
    assert isinstance(value, Value)
    return value


def axes(*numbers: int) -> Any:
    """A 1-D constant of axes or sizes."""
    return np.array(numbers, dtype=np.int64)


@emits(*_UNARY)
def unary(e: Emitter, equation: Equation) -> ov.Output:
    return _UNARY[equation.op](e.node(equation.args[0])).output(0)


@emits(*_BINARY)
def binary(e: Emitter, equation: Equation) -> ov.Output:
    dtype = equation.values[0].type.dtype
    a, b = (e.node(arg, dtype) for arg in equation.args)
    return _BINARY[equation.op](a, b).output(0)


@emits("compare")
def compare(e: Emitter, equation: Equation) -> ov.Output:
    dtype = equation.values[0].type.dtype
    a, b = (e.node(arg, dtype) for arg in equation.args)
    return _COMPARE[str(equation.attr["kind"])](a, b).output(0)


@emits("where")
def where(e: Emitter, equation: Equation) -> ov.Output:
    dtype = equation.result.type.dtype
    condition, a, b = (e.node(arg, dtype) for arg in equation.args)
    return ops.select(condition, a, b).output(0)


@emits("rsqrt")
def rsqrt(e: Emitter, equation: Equation) -> ov.Output:
    return ops.divide(e.scalar(1.0), ops.sqrt(e.node(equation.args[0]))).output(0)


@emits("gelu")
def gelu(e: Emitter, equation: Equation) -> ov.Output:
    return ops.gelu(e.node(equation.args[0]), "TANH" if equation.attr["approximate"] else "ERF").output(0)


@emits("cast")
def cast(e: Emitter, equation: Equation) -> ov.Output:
    x, held = e.node(equation.args[0]), element(HELD[equation.result.type.dtype])
    if x.get_element_type() == held:
        return x
    if held == ov.Type.boolean:
        return ops.not_equal(x, ops.constant(0, dtype=x.get_element_type())).output(0)
    return ops.convert(x, held).output(0)


@emits("matmul")
def matmul(e: Emitter, equation: Equation) -> ov.Output:
    a, b = (e.node(arg) for arg in equation.args)
    return ops.matmul(a, b, False, bool(equation.attr.get("transpose_b", False))).output(0)


@emits("gather")
def gather(e: Emitter, equation: Equation) -> ov.Output:
    table, index = e.scope[operand(equation, 0).name], e.node(equation.args[1])
    rows = e.constant(table) if isinstance(table, Stored) else table
    if equation.attr.get("dims", 1) != 1:
        tail = (int(str(dim)) for dim in equation.result.type.shape[len(equation.values[1].type.shape) :])
        rows = ops.reshape(rows, axes(-1, *tail), False).output(0)
    return e.widened(ops.gather(rows, index, np.int64(0)).output(0), equation.result.type)


@emits("mean")
def mean(e: Emitter, equation: Equation) -> ov.Output:
    return ops.reduce_mean(e.node(equation.args[0]), axes(-1), keep_dims=True).output(0)


@emits("sum")
def sum_(e: Emitter, equation: Equation) -> ov.Output:
    return ops.reduce_sum(e.node(equation.args[0]), axes(-1), keep_dims=True).output(0)


@emits("softmax")
def softmax(e: Emitter, equation: Equation) -> ov.Output:
    x, *sink = (e.node(arg) for arg in equation.args if arg is not None)
    return softmax_with(x, sink[0]) if sink else ops.softmax(x, -1).output(0)


def softmax_with(x: ov.Output, sink: ov.Output) -> ov.Output:
    """A softmax over the last dim that one more logit joins: `sink`, of the same rank with a last dim of 1."""
    top = ops.maximum(ops.reduce_max(x, axes(-1), keep_dims=True), sink)
    weights = ops.exp(ops.subtract(x, top))
    total = ops.add(ops.reduce_sum(weights, axes(-1), keep_dims=True), ops.exp(ops.subtract(sink, top)))
    return ops.divide(weights, total).output(0)


@emits("reshape")
def reshape(e: Emitter, equation: Equation) -> ov.Output:
    return reshaped(e.node(equation.args[0]), shape_of(operand(equation, 0)), equation.result.type.shape)


def reshaped(x: ov.Output, source: tuple[int | str, ...], target: tuple[int | str, ...]) -> ov.Output:
    """x under another shape: one symbolic dim is computed (-1), others are copied (0) or read from x's shape."""
    plain = [-1 if isinstance(size, str) else size for size in target]
    if plain.count(-1) <= 1:
        return ops.reshape(x, axes(*plain), False).output(0)
    if all(not isinstance(size, str) or source[index : index + 1] == (size,) for index, size in enumerate(target)):
        return ops.reshape(x, axes(*(0 if isinstance(size, str) else size for size in target)), True).output(0)
    sizes = ops.shape_of(x, "i64")
    parts = [
        ops.gather(sizes, axes(source.index(size)), np.int64(0)) if isinstance(size, str) else ops.constant(axes(size))
        for size in target
    ]
    return ops.reshape(x, ops.concat(parts, 0), False).output(0)


@emits("transpose")
def transpose(e: Emitter, equation: Equation) -> ov.Output:
    rank, moved = operand(equation, 0).type.rank, equation.attr["axes"]
    assert isinstance(moved, tuple)
    order = [*range(rank - len(moved)), *(int(str(axis)) % rank for axis in moved)]
    return ops.transpose(e.node(equation.args[0]), axes(*order)).output(0)


@emits("concat")
def concat(e: Emitter, equation: Equation) -> ov.Output:
    return ops.concat([e.node(arg) for arg in equation.args], int(str(equation.attr["axis"]))).output(0)


@emits("slice")
def slice_(e: Emitter, equation: Equation) -> ov.Output:
    start, stop, axis = (int(str(equation.attr[name])) for name in ("start", "stop", "axis"))
    return part(e.node(equation.args[0]), start, stop, axis)


def part(x: ov.Output, start: int, stop: int, axis: int = -1, step: int = 1) -> ov.Output:
    """Elements start:stop:step of one axis."""
    return ops.slice(x, axes(start), axes(stop), axes(step), axes(axis)).output(0)


@emits("rms_norm")
def rms_norm(e: Emitter, equation: Equation) -> ov.Output:
    x, weight = (e.node(arg) for arg in equation.args)
    # the plugin's norm fusion looks for Power and Divide, not for their equals
    square = ops.power(x, e.scalar(2.0))
    spread = ops.sqrt(ops.add(ops.reduce_mean(square, axes(-1), keep_dims=True), e.scalar(_eps(equation))))
    return ops.multiply(ops.multiply(x, ops.divide(e.scalar(1.0), spread)), weight).output(0)


@emits("layer_norm")
def layer_norm(e: Emitter, equation: Equation) -> ov.Output:
    x, weight, bias = (*equation.args, None, None)[:3]
    normed = ops.mvn(e.node(x), axes(-1), True, _eps(equation), "inside_sqrt")
    if weight is not None:
        normed = ops.multiply(normed, e.node(weight))
    return (normed if bias is None else ops.add(normed, e.node(bias))).output(0)


def _eps(equation: Equation) -> float:
    eps = equation.attr["eps"]
    assert isinstance(eps, (int, float))
    return float(eps)


@emits("rotate")
def rotate(e: Emitter, equation: Equation) -> ov.Output:
    x, cos, sin = (e.node(arg) for arg in equation.args)
    dim, half = (shape_of(operand(equation, index))[-1] for index in (0, 1))
    assert isinstance(dim, int)
    assert isinstance(half, int)
    turned = part(x, 0, 2 * half) if dim > 2 * half else x
    turned = (_rotate_half if equation.attr["style"] == "half" else _rotate_pairs)(e, turned, cos, sin, half, equation)
    return ops.concat([turned, part(x, 2 * half, dim)], -1).output(0) if dim > 2 * half else turned


def _rotate_half(e: Emitter, x: ov.Output, cos: ov.Output, sin: ov.Output, half: int, equation: Equation) -> ov.Output:
    """x * [cos, cos] + [-b, a] * [sin, sin] for x = [a, b]: the form that the plugin's fusion knows."""
    del equation

    def table(half_table: ov.Output) -> ov.Output:
        twice = ops.concat([half_table, half_table], -1)
        return ops.unsqueeze(twice, axes(-2)).output(0)

    cos2, sin2 = (e.memo(("rotate_half", *identity(t)), partial(table, t)) for t in (cos, sin))
    a, b = part(x, 0, half), part(x, half, 2 * half)
    turned = ops.concat([ops.multiply(b, e.scalar(-1.0)), a], -1)
    return ops.add(ops.multiply(x, cos2), ops.multiply(turned, sin2)).output(0)


def _rotate_pairs(e: Emitter, x: ov.Output, cos: ov.Output, sin: ov.Output, half: int, equation: Equation) -> ov.Output:
    """The same with a and b taken from even and odd places."""
    at = shape_of(operand(equation, 0))[:-1]

    def table(column: ov.Output) -> ov.Output:
        return ops.unsqueeze(column, axes(-3, -1)).output(0)

    cos1, sin1 = (e.memo(("rotate_pairs", *identity(t)), partial(table, t)) for t in (cos, sin))
    pairs = reshaped(x, (*at, 2 * half), (*at, half, 2))
    a, b = part(pairs, 0, 1), part(pairs, 1, 2)
    first = ops.subtract(ops.multiply(a, cos1), ops.multiply(b, sin1))
    second = ops.add(ops.multiply(b, cos1), ops.multiply(a, sin1))
    joined = ops.concat([first, second], -1).output(0)
    return reshaped(joined, (*at, half, 2), (*at, 2 * half))
