"""Mixtures of experts in OpenVINO: rows sorted by expert, then products of each row with its expert's matrix only.

Two forms, chosen when it runs by the number of rows; docs/decisions.md has what they and others cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import openvino as ov
import openvino.opset15 as ops
from openvino.op import if_op
from openvino.opset17 import grouped_matmul

from compiler.ir.core import Equation, Value
from compiler.ir.types import TensorType
from compiler.lower.openvino.emitter import Emitter, emits, identity
from compiler.lower.openvino.operations import axes, operand, shape_of
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
    experts, out, width = weight.type.static_shape()
    groups = _groups(e, index, experts)
    order = groups.order
    if shape_of(x)[-2] == 1:  # one row for all products of a token
        order = ops.divide(order, np.int32(int(str(shape_of(index)[-1])))).output(0)
    rows = ops.gather(ops.reshape(e.node(x), axes(-1, width), False), order, np.int64(0)).output(0)
    if isinstance(e.scope[weight.name], Stored):
        products = _either(e, rows, e.node(weight), groups, weight.type)
    else:
        products = _by_expert(rows, groups.sizes, e.node(weight), weight.type)
    shape = ops.concat([ops.shape_of(e.node(index), "i64"), axes(out)], 0)
    return ops.reshape(ops.gather(products, groups.place, np.int64(0)), shape, False).output(0)


def _by_expert(rows: ov.Output, sizes: ov.Output, weight: ov.Output, kind: TensorType) -> ov.Output:
    """A product for each expert on its own rows: fast where experts have many."""
    experts, out, width = kind.static_shape()
    mine = ops.variadic_split(rows, np.int64(0), sizes)
    matrices = ops.split(weight, np.int64(0), experts)
    products = [
        ops.matmul(mine.output(n), ops.reshape(matrices.output(n), axes(out, width), False), False, True)
        for n in range(experts)
    ]
    return ops.concat(products, 0).output(0)


def _either(e: Emitter, rows: ov.Output, weight: ov.Output, groups: _Groups, kind: TensorType) -> ov.Output:
    """By expert where there are more rows than experts, else in one operation, which the plugin runs row by row."""
    experts, out, width = kind.static_shape()
    key = identity(groups.sizes)
    count = e.memo((*key, "count"), lambda: ops.squeeze(ops.shape_of(groups.order, "i32"), axes(0)).output(0))
    many = e.memo((*key, "many"), lambda: ops.greater(count, np.int32(experts)).output(0))
    few = e.memo(
        (*key, "few"), lambda: ops.unsqueeze(ops.select(many, np.int32(0), count), axes(0)).output(0)
    )  # rows for the one operation: all or none
    ends = e.memo((*key, "ends"), lambda: ops.minimum(ops.cumsum(groups.sizes, np.int64(0)), few).output(0))
    single = grouped_matmul(ops.slice(rows, axes(0), few, axes(1), axes(0)), weight, ends)
    ports = [ov.op.Parameter(rows.get_element_type(), ov.PartialShape([-1, width])),
             ov.op.Parameter(groups.sizes.get_element_type(), ov.PartialShape([experts])),
             ov.op.Parameter(weight.get_element_type(), ov.PartialShape([experts, out, width]))]  # fmt: skip
    inner, sizes, matrices = (port.output(0) for port in ports)
    products = ops.result(_by_expert(inner, sizes, matrices, kind))
    nothing = ops.result(ops.constant(np.zeros((0, out), np.float32)))
    choice = if_op(many)
    choice.set_then_body(_named(ov.Model([products], ports, "by expert")))
    choice.set_else_body(_named(ov.Model([nothing], [], "nothing")))
    for port, value in zip(ports, (rows, groups.sizes, weight), strict=True):
        choice.set_input(value, port, None)
    return ops.concat([single, choice.set_output(products, nothing)], 0).output(0)


def _named(body: ov.Model) -> ov.Model:
    """With names that do not count through the process, so that a model is written the same each time."""
    for number, node in enumerate(body.get_ordered_ops()):
        node.set_friendly_name(f"{body.get_friendly_name()}/{node.get_type_name()}.{number}")
    return body


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
