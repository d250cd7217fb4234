"""Choosing experts, and products with the chosen."""

from __future__ import annotations

from compiler.ir.core import Equation
from compiler.ir.types import Shape
from compiler.lower.tensorrt.emitter import Emitter, Tensor, attr_int, emits
from compiler.lower.tensorrt.operations import transposed


@emits("top_k")
def top_k(e: Emitter, equation: Equation) -> Tensor:
    x, kind = equation.values[0], equation.result.type
    layer = e.network.add_topk(e.scope[x.name], e.trt.TopKOperation.MAX, attr_int(equation, "k"), 1 << (kind.rank - 1))
    return e.out(layer, "i32", compute=x.type.dtype, index=1)


@emits("take")
def take(e: Emitter, equation: Equation) -> Tensor:
    x, index = (e.scope[value.name] for value in equation.values)
    layer = e.network.add_gather_v2(x, index, e.trt.GatherMode.ELEMENT)
    layer.axis = equation.result.type.rank - 1
    return e.out(layer, equation.result.type.dtype)


@emits("gather_matmul")
def gather_matmul(e: Emitter, equation: Equation) -> Tensor:
    """Every row times every expert's matrix, then the chosen of each: [E,R,O] -> [R,E,O] -> [R,K,O]."""
    x, weight, index = equation.values
    kind = equation.result.type
    rows, width = x.type.shape[-2], x.type.shape[-1]
    chosen = index.type.shape[-1] if rows == 1 else 1  # of one row; else each row has an expert of its own
    flat = e.flat(e.scope[x.name], (1, -1, int(width)), kind.dtype, "rows")
    places = e.flat(e.scope[index.name], (-1, int(chosen)), index.type.dtype, "chosen")
    plain, turned = e.trt.MatrixOperation.NONE, e.trt.MatrixOperation.TRANSPOSE
    layer = e.network.add_matrix_multiply(flat, plain, e.scope[weight.name], turned)
    every = transposed(e, e.out(layer, kind.dtype, "experts"), [1, 0, 2], kind.dtype, "by_row")
    picked = e.network.add_gather(every, places, 1)
    picked.num_elementwise_dims = 1
    out = e.out(picked, kind.dtype, "picked")
    inner: Shape = ("rows", int(chosen), int(weight.type.shape[1]))
    return e.reshape(out, inner, kind.shape, kind.dtype)
