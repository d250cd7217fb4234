"""Which rounding of activations the plugin's products do themselves, told from the graph alone.

Dynamic: with DYNAMIC_QUANTIZATION_GROUP_SIZE every product of a low-bit integer weight rounds its input to INT8, 32
inputs of a token to a scale. It is one setting for a whole model, so it is used where every such product asks for it.
"""

from __future__ import annotations

from compiler.ir.core import Equation, Graph, Value, walk

GROUP = 32
_INTEGERS = frozenset({"i8", "u8", "i4", "u4"})


def dynamic_group(graph: Graph) -> int:
    """32 where the plugin may round all inputs of low-bit products itself, 0 where it must round none."""
    made = {value.name: equation for equation in walk(graph.equations) for value in equation.results}
    rounded = [
        rounds_in_product(equation.args[0], made)
        for equation in walk(graph.equations)
        if equation.op == "matmul" and _is_low_bit(equation.args[1], made)
    ]
    return GROUP if rounded and all(rounded) else 0


def _is_low_bit(arg: object, made: dict[str, Equation]) -> bool:
    source = made.get(arg.name) if isinstance(arg, Value) else None
    return source is not None and source.op == "dequantize" and source.values[0].type.dtype in _INTEGERS


def rounds_in_product(arg: object, made: dict[str, Equation]) -> bool:
    """Whether an operand is what the plugin's own rounding makes: INT8 by 32 inputs of a token, scales at hand."""
    wide = made.get(arg.name) if isinstance(arg, Value) else None
    codes = made.get(wide.values[0].name) if wide is not None and wide.op == "dequantize" else None
    scale = made.get(codes.values[1].name) if codes is not None and codes.op == "quantize" else None
    return (
        codes is not None
        and scale is not None
        and scale.op == "row_scale"
        and scale.attr.get("scale", "f32") == "f32"
        and codes.attr["dtype"] == "i8"
        and codes.attr.get("block") == (1, GROUP)
        and len(codes.values) == 2
    )
