"""Mixtures of experts in OpenVINO: tokens sorted by expert, and one product for each expert on its own rows.

An expert that no token chose has no rows, and the plugin does not run an operation on nothing: only what is needed is
computed (docs/decisions.md has what other forms cost).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import openvino as ov
import openvino.opset15 as ops

from compiler.ir.core import Equation, Value
from compiler.ir.types import TensorType
from compiler.lower.openvino.emitter import Emitter, emits, identity
from compiler.lower.openvino.operations import axes, operand, part, shape_of
from compiler.lower.openvino.quantize import matrix
from compiler.lower.openvino.stored import Stored


@emits("top_k")
def top_k(e: Emitter, equation: Equation) -> ov.Output:
    k = np.int32(int(str(equation.attr["k"])))
    found = ops.topk(e.node(equation.args[0]), k, -1, "max", "value", index_element_type="i32", stable=True)
    return found.output(1)


@emits("take")
def take(e: Emitter, equation: Equation) -> ov.Output:
    x, index = (e.node(arg) for arg in equation.args)
    return ops.gather_elements(x, index, -1).output(0)


@emits("gather_matmul")
def gather_matmul(e: Emitter, equation: Equation) -> ov.Output:
    x, weight, index = (operand(equation, number) for number in range(3))
    (experts, out, width), chosen = shape_of(weight), shape_of(index)[-1]
    assert isinstance(experts, int)
    groups = _groups(e, index, experts)
    flat = ops.reshape(e.node(x), axes(-1, int(str(width))), False)
    if shape_of(x)[-2] == 1:  # one row for all products of a token
        order = ops.divide(groups.order, np.int32(int(str(chosen))))
    else:
        order = groups.order
    mine = ops.variadic_split(ops.gather(flat, order, np.int64(0)), np.int64(0), groups.sizes)
    products = [ops.matmul(mine.output(n), _matrix(e, weight, n), False, True) for n in range(experts)]
    joined = ops.gather(ops.concat(products, 0), groups.place, np.int64(0)).output(0)
    shape = ops.concat([ops.shape_of(e.node(index), "i64"), axes(int(str(out)))], 0)
    return ops.reshape(joined, shape, False).output(0)


@dataclass(frozen=True)
class _Groups:
    """A stable sort of the chosen experts, [T*K]: `place` of each in it, what stands at each place, sizes [E]."""

    place: ov.Output
    order: ov.Output
    sizes: ov.Output


def _groups(e: Emitter, index: Value, experts: int) -> _Groups:
    """By counting, once for all products of a layer: the plugin's own sort takes quadratic time."""
    chosen = e.node(index)
    key = ("groups", *identity(chosen))

    def hot() -> ov.Output:
        flat = ops.reshape(chosen, axes(1, -1), False)
        return ops.convert(ops.equal(flat, np.arange(experts, dtype=np.int32)[:, None]), "i32").output(0)

    def sizes() -> ov.Output:
        return ops.reduce_sum(e.memo((*key, "hot"), hot), axes(1), keep_dims=False).output(0)

    def place() -> ov.Output:
        mine, begin = e.memo((*key, "hot"), hot), ops.cumsum(e.memo((*key, "sizes"), sizes), np.int64(0), True)
        rank = ops.add(ops.cumsum(mine, np.int64(1), True), ops.unsqueeze(begin, axes(1)))
        return ops.reduce_sum(ops.multiply(mine, rank), axes(0), keep_dims=False).output(0)

    def order() -> ov.Output:
        at = e.memo((*key, "place"), place)
        count = ops.squeeze(ops.shape_of(at, "i32"), axes(0))
        numbers = ops.range(np.int32(0), count, np.int32(1), "i32")
        return ops.scatter_update(numbers, at, numbers, np.int64(0)).output(0)

    return _Groups(e.memo((*key, "place"), place), e.memo((*key, "order"), order), e.memo((*key, "sizes"), sizes))


def _matrix(e: Emitter, weight: Value, number: int) -> ov.Output:
    """One expert's matrix [O,M]: of stored weights a constant that shares their memory."""
    held = e.scope[weight.name]
    if isinstance(held, Stored):
        one = Stored(
            held.tensor[number], TensorType(weight.type.dtype, weight.type.shape[1:]), f"{held.name}[{number}]"
        )
        return e.widened(e.constant(one), one.type)
    unpacked = matrix(e, weight, number)
    if unpacked is not None:
        return unpacked
    return ops.squeeze(part(held, number, number + 1, 0), axes(0)).output(0)
