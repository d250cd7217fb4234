"""Codes and scales as TensorRT's Q/DQ layers, whose scales are constants of the build, in every version.

A scale of ours is an input of the engine, or computed for each row: it can't be theirs. The layers get a power of two,
and what is left of the scale stands outside of the product,

    quantize(x, s) = Q(x / (s / u), u)        matmul(dequantize(a, s), w) = matmul(DQ(a, u), w) s / u

which are the same codes, and products in the range of float16. Between DQ and product nothing may stand, or TensorRT
multiplies floats. Blocks that share a scale have no such form: the scales of a weight's must be constants, those of an
input's are made by the layer that quantizes it (IDynamicQuantizeLayer).

Sources: docs.nvidia.com/deeplearning/tensorrt, operators Quantize, Dequantize, DynamicQuantize, and quantization
schemes; which operands an ONNX importer of NVIDIA gives these layers (onnx-tensorrt, QuantDequantLinearHelper).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from compiler.ir.core import Equation, Graph, Value, used_values, walk
from compiler.ir.formats import RANGE
from compiler.ir.types import Shape
from compiler.lower.tensorrt.emitter import Emitter, Operand, Tensor, emits
from specs.errors import SpecRTError

# What codes are multiplied by in the network: the largest become about 1, the smallest are exact in float16.
UNIT = {"i8": 2.0**-7, "f8e4m3": 2.0**-9}
LEAST = 1e-12  # of a row's scale (compiler/ir/ops/quantize.py)


@dataclass(frozen=True)
class Blocks:
    """An input quantized by blocks in one layer: the values of its codes and of its scales, and the outer scale."""

    codes: Value
    scale: Value
    outer: Value | None


@dataclass(frozen=True)
class Outlook:
    """What must be known of a segment before its first layer: which values stand in no layer of their own."""

    products: frozenset[str] = frozenset()  # dequantized values that only products read
    blocks: Mapping[str, Blocks] = field(default_factory=dict)  # by the name of the codes
    absorbed: frozenset[str] = frozenset()  # equations that a layer of blocks computes


def outlook(graph: Graph) -> Outlook:
    """Look through a segment."""
    made = {equation.results[0].name: equation for equation in graph.equations}
    readers: dict[str, list[Equation]] = {}
    for equation in walk(graph.equations):
        for value in used_values(equation):
            readers.setdefault(value.name, []).append(equation)
    outputs = {value.name for _, value in graph.outputs}
    products = {
        name
        for name, equation in made.items()
        if equation.op == "dequantize" and name not in outputs
        if all(_multiplies(reader, name) for reader in readers.get(name, ()))
    }
    blocks: dict[str, Blocks] = {}
    absorbed: set[str] = set()
    for name, equation in made.items():
        scale = made.get(equation.values[1].name) if equation.op == "quantize" and "block" in equation.attr else None
        chain = [] if scale is None else _chain(made, equation, scale)
        inner = {reader.results[0].name for part in chain[1:] for reader in readers.get(part, ())}
        if scale is not None and chain and inner <= set(chain) and not outputs & set(chain[1:]):
            outer = equation.args[3] if len(equation.args) > 3 else None
            blocks[name] = Blocks(equation.result, scale.result, outer if isinstance(outer, Value) else None)
            absorbed |= set(chain)
    return Outlook(frozenset(products), blocks, frozenset(absorbed))


def _multiplies(reader: Equation, name: str) -> bool:
    right = reader.op == "matmul" and reader.values[1].name == name
    return reader.op == "matmul" and (not right or reader.attr.get("transpose_b") is True)


def _chain(made: Mapping[str, Equation], codes: Equation, scale: Equation) -> list[str]:
    """The equations that make the scales of an input's blocks, if they are what the layer of blocks computes."""
    x = codes.values[0].name
    if scale.op == "row_scale" and scale.values[0].name == x and scale.attr.get("scale") == "f8e8m0":
        return [scale.result.name]
    if scale.op != "quantize" or len(codes.args) < 4:
        return []
    most = made.get(scale.values[0].name)  # maximum(row_scale(x), least), or the scales themselves
    if most is None or most.op == "row_scale":
        return [] if most is None or most.values[0].name != x else [scale.result.name, most.result.name]
    size, *least = (made.get(value.name) for value in most.values) if most.op == "maximum" else (None,)
    if size is None or size.op != "row_scale" or size.values[0].name != x:
        return []
    floor = [part.result.name for part in least if part is not None and part.op == "mul"]  # else it is stored
    return [scale.result.name, most.result.name, size.result.name, *floor]


# -- equations --------------------------------------------------------------------------------------------------------


@emits("quantize")
def quantize(e: Emitter, equation: Equation) -> Tensor:
    x, scale = equation.values[:2]
    to = equation.result.type.dtype
    if equation.result.name in e.outlook.blocks:
        return _by_blocks(e, equation, e.outlook.blocks[equation.result.name])
    wide = e.cast(e.scope[x.name], x.type.dtype, "f32")
    wide = e.elementwise("DIV", wide, _factor(e, scale, to, x.type.rank), "f32", "scaled")
    step = e.scalar(UNIT[to], "f32", 1)
    layer = e.network.add_quantize(wide, step, *([e.type(to)] if e.dialect.strong else []))
    layer.axis = min(x.type.rank - 1, 1)  # as _dequantized
    return e.out(layer, to, compute="f32")


def _factor(e: Emitter, scale: Value, codes: str, rank: int, shape: Shape | None = None) -> Tensor:
    """What is left of a scale beside the unit of its codes, float32 and of a rank; `shape` where it is turned."""
    key = ("factor", scale.name, codes, rank, shape)

    def make() -> Tensor:
        wide = e.cast(e.scope[scale.name], scale.type.dtype, "f32")
        wide = e.elementwise("PROD", wide, e.scalar(1 / UNIT[codes], "f32", scale.type.rank), "f32", "unit")
        if shape is not None:
            return e.reshape(wide, scale.type.shape, shape, "f32", "column")
        return e.aligned(wide, scale.type.shape, rank, "f32")

    return e.memo(key, make)


def _by_blocks(e: Emitter, equation: Equation, blocks: Blocks) -> Tensor:
    """Codes, and as a second output the scales, which are found in the scope from here on."""
    layer = _dynamic(e, equation.values[0], attr_block(equation), equation.result.type.dtype, blocks.scale.type.dtype)
    if blocks.outer is not None:
        layer.set_input(1, _constant(e, blocks.outer))
    e.scope[blocks.scale.name] = layer.get_output(1)
    return e.out(layer, equation.result.type.dtype, compute="none")


def _dynamic(e: Emitter, x: Value, size: int, codes: str, scale: str) -> Tensor:
    return e.network.add_dynamic_quantize(e.scope[x.name], x.type.rank - 1, size, e.type(codes), e.type(scale))


def attr_block(equation: Equation) -> int:
    """How many elements of a row share a scale."""
    block = equation.attr["block"]
    return int(str(block[-1] if isinstance(block, tuple) else block))


@emits("dequantize")
def dequantize(e: Emitter, equation: Equation) -> Tensor:
    codes, scale = equation.values[:2]
    kind, name = equation.result.type, equation.result.name
    if "block" in equation.attr:
        return _from_blocks(e, equation)
    if name in e.outlook.products:
        e.operands[name] = Operand(codes, scale)
        return e.scope[codes.name]  # nobody reads it
    wide = e.cast(_unit(e, e.scope[codes.name], codes.type.dtype, kind.rank, kind.dtype), _made(e, kind.dtype), "f32")
    wide = e.elementwise("PROD", wide, _factor(e, scale, codes.type.dtype, kind.rank), "f32", "scaled")
    return e.cast(wide, "f32", kind.dtype)


def _made(e: Emitter, dtype: str) -> str:
    """What is made of codes on the way to a float type: 8.6 makes float32 and nothing else."""
    return dtype if e.dialect.strong else "f32"


def _unit(e: Emitter, tensor: Tensor, codes: str, rank: int, dtype: str) -> Tensor:
    made = _made(e, dtype)
    return _dequantized(e, tensor, e.scalar(UNIT[codes], made, 1), rank, made)


def _dequantized(e: Emitter, codes: Tensor, scale: Tensor, rank: int, dtype: str, *, blocked: bool = False) -> Tensor:
    layer = e.network.add_dequantize(codes, scale, *([e.type(dtype)] if e.dialect.strong else []))
    layer.axis = rank - 1 if blocked else min(rank - 1, 1)  # of no meaning for one scale, and looked at in 8.6
    return e.out(layer, dtype, "codes", compute="none")


def _from_blocks(e: Emitter, equation: Equation) -> Tensor:
    """Scales and what comes of them have one type: the result's where the scales have it too, else float32."""
    codes, scale = equation.values[:2]
    kind = equation.result.type
    made = kind.dtype if scale.type.dtype == kind.dtype else "f32"
    outer = equation.args[3] if len(equation.args) > 3 else None
    computed = any(blocks.scale.name == scale.name for blocks in e.outlook.blocks.values())
    steps = e.scope[scale.name] if computed else _constant(e, scale)
    if isinstance(outer, Value):
        steps = _dequantized(e, steps, _constant(e, outer), scale.type.rank, "f32")
    elif scale.type.dtype != "f8e8m0":
        steps = e.cast(steps, scale.type.dtype, made)
    return e.cast(_dequantized(e, e.scope[codes.name], steps, kind.rank, made, blocked=True), made, kind.dtype)


def _constant(e: Emitter, value: Value) -> Tensor:
    """A scale that must be known when the engine is built."""
    if value.name not in e.constants:
        message = f"TensorRT takes scales of blocks as constants only; %{value.name} is an input of the engine"
        hint = "`build: {weights: baked}` in the deployment spec: engines that hold their weights"
        raise SpecRTError("LOWER-040", message, where=e.where, hint=hint)
    return e.scope[value.name]


@emits("row_scale")
def row_scale(e: Emitter, equation: Equation) -> Tensor:
    x, kind, block = equation.values[0], equation.result.type, equation.attr.get("block")
    if kind.dtype == "f8e8m0":
        layer = _dynamic(e, x, attr_block(equation), str(equation.attr["dtype"]), kind.dtype)
        return e.out(layer, kind.dtype, compute="none", index=1)
    wide = e.unary("ABS", e.cast(e.scope[x.name], x.type.dtype, "f32"), "f32", "size")
    if block is not None:
        blocks = (*x.type.shape[:-1], kind.shape[-1], int(str(block)))
        wide = e.reshape(wide, x.type.shape, blocks, "f32", "blocks")
        most = e.mean(wide, len(blocks), "f32", "largest", op="MAX")
        most = e.reshape(most, (*blocks[:-1], 1), kind.shape, "f32", "largest")
    else:
        most = e.mean(wide, kind.rank, "f32", "largest", op="MAX")
    largest, least = RANGE[str(equation.attr["dtype"])][1], e.scalar(LEAST, "f32", kind.rank)
    step = e.elementwise("DIV", most, e.scalar(largest, "f32", kind.rank), "f32", "step")
    return e.elementwise("MAX", step, least, "f32")


# -- products ---------------------------------------------------------------------------------------------------------


def product(e: Emitter, equation: Equation) -> Tensor:
    """A product of which one operand at least is dequantized: the codes' own, then what is left of the scales."""
    a, b = equation.values
    kind = equation.result.type
    found = [e.operands.get(value.name) for value in (a, b)]
    dtype = _made(e, kind.dtype)
    sides = []
    for value, operand in zip((a, b), found, strict=True):
        if operand is None:
            wide = e.aligned(e.scope[value.name], value.type.shape, kind.rank, kind.dtype)
            sides.append(e.cast(wide, kind.dtype, dtype))
        else:
            codes = operand.codes
            tensor = e.aligned(e.scope[codes.name], value.type.shape, kind.rank, codes.type.dtype)
            sides.append(_unit(e, tensor, codes.type.dtype, kind.rank, kind.dtype))
    plain, turned = e.trt.MatrixOperation.NONE, e.trt.MatrixOperation.TRANSPOSE
    transpose = equation.attr.get("transpose_b", False) is True
    layer = e.network.add_matrix_multiply(sides[0], plain, sides[1], turned if transpose else plain)
    # told that it is float32, 8.6 would not multiply codes
    out = e.out(layer, dtype, "product", compute="none" if all(found) else dtype)
    out = e.cast(out, dtype, "f32")
    for side, operand in enumerate(found):
        if operand is None:
            continue
        scale, turn = operand.scale, None
        if side == 1 and scale.type.rank > 1:  # [*,O,1] of a weight's rows stands over columns of the product
            turn = (*(1,) * (kind.rank - scale.type.rank), *scale.type.shape[:-2], 1, scale.type.shape[-2])
        out = e.elementwise("PROD", out, _factor(e, scale, operand.codes.type.dtype, kind.rank, turn), "f32", "scaled")
    return e.cast(out, "f32", kind.dtype)
