"""What a device makes of weights that no file holds: numbers of the size that trained ones have, by what reads them.

`{"normal": mean}`: deviation 0.02. `{"codes": [and, or]}`: random bytes under two masks. `{"bits": number, "bytes": n}`
is one number for all, mostly a power of two, whose bits are its exponent's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compiler.ir.core import Graph, Value

Random = Mapping[str, Any]
CODES = {"i8": (255, 0), "i4": (255, 0), "u4": (255, 0), "f4e2m1": (255, 0), "f8e4m3": (0x87, 0x38)}  # E4M3: 1 to 1.875
# A weight's deviation is then about 0.02: uniform codes have 74 and 4.6, those of E4M3 1.5, those of E2M1 2.9.
_SCALE = {"i8": -12, "i4": -8, "u4": -8, "f8e4m3": -6, "f4e2m1": -7}
_INPUT = {"i8": -4, "f8e4m3": -6, "f4e2m1": -9}  # inputs up to 6 or so are in range
_EXPONENT = {"f32": (127, 23, 4), "f16": (15, 10, 2), "bf16": (127, 7, 2), "f8e4m3": (7, 3, 1), "f8e8m0": (127, 0, 1)}
_ZERO = {"bits": 8, "bytes": 1}  # in the middle of unsigned half bytes, a byte each


def random_weights(graph: Graph) -> dict[str, Random]:
    """How each weight of a graph is made, by the name that it is stored under."""
    names = {eq.result.name: str(eq.attr["name"]) for eq in graph.equations if eq.op == "weight"}
    types = {eq.result.name: eq.result.type for eq in graph.equations if eq.op == "weight"}
    found: dict[str, Random] = {name: {"normal": 0} for name in names.values()}

    def state(value: Value | None, how: Random) -> None:
        if isinstance(value, Value) and value.name in names:
            found[names[value.name]] = how

    for equation in graph.equations:
        if equation.op in ("rms_norm", "layer_norm"):
            state(equation.values[1] if len(equation.values) > 1 else None, {"normal": 1})
        elif equation.op == "dequantize" and equation.values[0].name in names:
            codes, scale, zero, outer = (*equation.args, None, None)[:4]
            assert isinstance(codes, Value)
            assert isinstance(scale, Value)
            exponent = _SCALE[codes.type.dtype]
            state(codes, {"codes": CODES[codes.type.dtype]})
            state(scale, power(scale.type.dtype, 0 if isinstance(outer, Value) else exponent))
            state(zero if isinstance(zero, Value) else None, _ZERO)
            state(outer if isinstance(outer, Value) else None, power("f32", exponent))
        elif equation.op == "quantize":
            for value in equation.values[1:]:
                if value.name in names:
                    state(value, power(value.type.dtype, _INPUT[equation.result.type.dtype]))
        elif equation.op == "maximum":  # of a rounded scale, the least that it may be
            for value in equation.values:
                state(value, power("f32", _INPUT["f4e2m1"] - 9))
        elif equation.op == "mul":
            for value in equation.values:
                if value.name in names and names[value.name].endswith(".smooth"):
                    state(value, power(types[value.name].dtype, 0))
    return found


def power(dtype: str, exponent: int) -> Random:
    """2^exponent in a type."""
    bias, shift, size = _EXPONENT[dtype]
    return {"bits": (exponent + bias) << shift, "bytes": size}
