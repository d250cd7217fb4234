"""How codes and their scales are written in OpenVINO's opset.

Weights: constant of codes, convert, subtract the zero, multiply by the scale, with each block on an axis of its own:
the form that the plugin's products read without unpacking. Activations: rounded in float32.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import openvino as ov
import openvino.opset15 as ops

from compiler.ir.core import Arg, Equation, Value
from compiler.ir.formats import LARGEST_EXPONENT, RANGE
from compiler.ir.types import TensorType
from compiler.lower.openvino.emitter import HELD, Emitter, element, emits
from compiler.lower.openvino.operations import axes, operand, reshaped, shape_of
from compiler.lower.openvino.stored import Stored

Shape = tuple[int | str, ...]


def _blocks(equation: Equation) -> tuple[int, ...]:
    block = equation.attr.get("block", ())
    assert isinstance(block, tuple)
    return tuple(int(str(size)) for size in block)


def _split(shape: Shape, block: tuple[int, ...]) -> Shape:
    """The shape with each blocked dim as (blocks, size); ragged blocks never come here (capabilities.ragged)."""
    out: list[int | str] = list(shape[: len(shape) - len(block)])
    for size, width in zip(shape[len(shape) - len(block) :], block, strict=True):
        out += [size] if width == 1 else [int(size) // width, width]
    return tuple(out)


def _aside(shape: Shape, block: tuple[int, ...]) -> Shape:
    """The shape of a scale beside a split tensor: 1 where a block has its elements."""
    out: list[int | str] = list(shape[: len(shape) - len(block)])
    for size, width in zip(shape[len(shape) - len(block) :], block, strict=True):
        out += [size] if width == 1 else [size, 1]
    return tuple(out)


def _under(e: Emitter, arg: Arg, shape: Shape) -> ov.Output:
    """An operand in its held type under another shape; a stored one is written under it."""
    assert isinstance(arg, Value)
    value = e.scope[arg.name]
    if not isinstance(value, Stored):
        return reshaped(value, arg.type.shape, shape)
    if value.type.shape == shape:
        return e.node(arg)
    static = tuple(int(size) for size in shape)
    moved = Stored(value.tensor.reshape(static), TensorType(value.type.dtype, static), value.name)
    return e.widened(e.constant(moved), moved.type)


def _parts(e: Emitter, equation: Equation) -> tuple[ov.Output, ov.Output, ov.Output | None]:
    """The first operand, the scale and the zero, in shapes that broadcast."""
    x, scale, zero, outer = (*equation.args, None, None, None)[:4]
    assert isinstance(x, Value)
    block = _blocks(equation)
    shape = x.type.shape
    split = _split(shape, block)
    beside = [
        None if arg is None else _under(e, arg, _aside(shape_of(arg), block)) if isinstance(arg, Value) else None
        for arg in (scale, zero)
    ]
    codes, (step, shift) = _under(e, x, split), beside
    assert step is not None
    if outer is not None:
        step = ops.multiply(step, e.node(outer)).output(0)
    return codes, step, shift


@emits("dequantize")
def dequantize(e: Emitter, equation: Equation) -> ov.Output:
    made = e.rounding.get(operand(equation, 0).name)
    if made is not None:
        if e.dynamic and made.attr.get("block") == (1, e.dynamic):
            return e.node(made.args[0])  # the product rounds it
        scale = e.scope[operand(made, 1).name]
        if (
            isinstance(scale, Stored)
            and scale.type.shape == (1,)
            and len(made.args) == 2
            and made.attr["dtype"] == "i8"
        ):
            return _static(e, e.node(made.args[0]), float(scale.tensor))
    if isinstance(e.scope[operand(equation, 0).name], Stored):
        e.made[equation.result.name] = equation
    codes, step, zero = _parts(e, equation)
    wide = codes if codes.get_element_type() == ov.Type.f32 else ops.convert(codes, "f32").output(0)
    if zero is not None:
        zero = zero if zero.get_element_type() == ov.Type.f32 else ops.convert(zero, "f32").output(0)
        wide = ops.subtract(wide, zero).output(0)
    return _whole(ops.multiply(wide, step).output(0), equation)


def matrix(e: Emitter, weight: Value, number: int) -> ov.Output | None:
    """One of the matrices [O,M] that a weight of codes [E,O,M] stands for, so that only chosen ones are unpacked.

    None where the weight is not made from codes.
    """
    equation = e.made.get(weight.name)
    if equation is None:
        return None
    args: list[Arg] = []
    for arg in equation.args:
        held = e.scope[arg.name] if isinstance(arg, Value) else None
        if isinstance(arg, Value) and isinstance(held, Stored) and arg.type.rank == weight.type.rank:
            one = Value(f"{arg.name}[{number}]", TensorType(arg.type.dtype, arg.type.shape[1:]))
            e.scope[one.name] = Stored(held.tensor[number], one.type, f"{held.name}[{number}]")
            args.append(one)
        else:
            args.append(arg)
    kind = TensorType(weight.type.dtype, weight.type.shape[1:])
    return dequantize(e, replace(equation, args=tuple(args), results=(Value(f"{weight.name}[{number}]", kind),)))


def _whole(output: ov.Output, equation: Equation) -> ov.Output:
    shape, block = shape_of(equation.result), _blocks(equation)
    split = _split(shape, block)
    return output if split == shape else reshaped(output, split, shape)


def _static(e: Emitter, x: ov.Output, scale: float) -> ov.Output:
    """INT8 and back as the one operation from which the plugin makes INT8 products."""
    low, high = (e.scalar(end * scale) for end in RANGE["i8"])
    return ops.fake_quantize(x, low, high, low, high, 256).output(0)


@emits("quantize")
def quantize(e: Emitter, equation: Equation) -> ov.Output:
    e.rounding[equation.result.name] = equation
    x, step, zero = _parts(e, equation)
    exact = ops.divide(x, step).output(0)
    dtype = equation.result.type.dtype
    if zero is not None:
        zero = zero if zero.get_element_type() == ov.Type.f32 else ops.convert(zero, "f32").output(0)
        exact = ops.add(ops.round(exact, "half_to_even"), zero).output(0)
    rounded = _whole(_round_to(e, exact, dtype), equation)
    held = element(HELD[dtype])
    return rounded if rounded.get_element_type() == held else ops.convert(rounded, held).output(0)


def _round_to(e: Emitter, x: ov.Output, dtype: str) -> ov.Output:
    """Values of a format, in float32; NaN is not looked after."""
    low, high = RANGE[dtype]
    inside = ops.clamp(x, float(low), float(high)).output(0)
    if dtype == "f8e4m3":  # the plugin's own conversion rounds twice, by way of float16
        power = ops.maximum(_floor_to_power(e, ops.absolute(inside).output(0)), e.scalar(2.0**-6))
        step = ops.multiply(power, e.scalar(0.125))
        return ops.multiply(ops.round(ops.divide(inside, step), "half_to_even"), step).output(0)
    if dtype != "f4e2m1":
        return ops.round(inside, "half_to_even").output(0)
    size = ops.absolute(inside)
    large = ops.select(ops.less(size, e.scalar(4.0)), e.scalar(1.0), e.scalar(2.0))
    step = ops.select(ops.less(size, e.scalar(2.0)), e.scalar(0.5), large)
    return ops.multiply(ops.round(ops.divide(inside, step), "half_to_even"), step).output(0)


@emits("row_scale")
def row_scale(e: Emitter, equation: Equation) -> ov.Output:
    x, dtype = operand(equation, 0), str(equation.attr["dtype"])
    shape, width = shape_of(x), equation.attr.get("block")
    if width is None:
        largest = ops.reduce_max(ops.absolute(e.node(x)), axes(-1), True).output(0)
    else:
        split = _split(shape, (int(str(width)),))
        largest = ops.reduce_max(ops.absolute(reshaped(e.node(x), shape, split)), axes(-1), True).output(0)
        largest = reshaped(largest, (*split[:-1], 1), shape_of(equation.result))
    if equation.attr.get("scale", "f32") == "f32":
        step = ops.divide(largest, e.scalar(float(RANGE[dtype][1])))
        return ops.maximum(step, e.scalar(1e-12)).output(0)
    return _power_of_two(e, largest, dtype)


def _power_of_two(e: Emitter, largest: ov.Output, dtype: str) -> ov.Output:
    step = ops.multiply(_floor_to_power(e, largest), e.scalar(2.0 ** -LARGEST_EXPONENT[dtype]))
    return ops.select(ops.greater(largest, e.scalar(0.0)), step, e.scalar(1.0)).output(0)


def _floor_to_power(e: Emitter, x: ov.Output) -> ov.Output:
    """The largest power of two up to x, from 2^-100; log2 may be a step off near one, which comparing corrects."""
    least = ops.maximum(x, e.scalar(2.0**-100))
    exponent = ops.floor(ops.divide(ops.log(least), ops.constant(np.float32(np.log(2.0)))))
    power = ops.power(e.scalar(2.0), exponent)
    exact = ops.convert(ops.convert(power, "f8e8m0"), "f32")  # E8M0 holds powers of two only
    exact = ops.select(ops.greater(exact, least), ops.multiply(exact, e.scalar(0.5)), exact)
    twice = ops.multiply(exact, e.scalar(2.0))
    return ops.select(ops.less_equal(twice, least), twice, exact).output(0)
