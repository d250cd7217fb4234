"""How far a backend may be from the interpreter, for each operation and element type: one table, with its sources.

|got - expected| <= absolute + relative * |expected|. u is the unit roundoff: 2^-24 of f32, 2^-9 of bf16, 2^-12 of f16.
"""

from __future__ import annotations

from dataclasses import dataclass

U = {"f32": 2.0**-24, "bf16": 2.0**-9, "f16": 2.0**-12}


@dataclass(frozen=True)
class Tolerance:
    absolute: float
    relative: float
    source: str

    def times(self, factor: float) -> Tolerance:
        """A wider one, for a reason that the caller states."""
        return Tolerance(self.absolute * factor, self.relative * factor, self.source)


EXACT = Tolerance(0.0, 0.0, "moves or compares elements, or integers: no rounding")
_GROUPS: dict[str, tuple[str, ...]] = {
    "moved": ("where", "relu", "maximum", "minimum", "gather", "reshape", "transpose", "concat", "slice", "weight",
              "const", "repeat", "compare", "and", "or", "top_k", "take", "update_cache", "all_gather"),
    "rounded": ("add", "all_reduce", "sub", "mul", "div", "cast", "row_scale", "quantize"),
    "function": ("exp", "rsqrt", "cos", "sin", "tanh", "erf", "sigmoid", "silu", "gelu"),
    "reduced": ("matmul", "gather_matmul", "mean", "sum", "softmax", "rms_norm", "layer_norm", "rotate", "dequantize"),
    "attention": ("attention", "paged_attention", "cached_attention"),
}  # fmt: skip
# Each bound is a small multiple of u; values of the cases are of size 1 to 10, reductions have at most 48 terms.
_FLOAT: dict[str, tuple[float, float, str]] = {
    "moved": (0.0, 2.0, "a bf16 engine may round f32 operands on the way in: one rounding, u"),
    "rounded": (0.0, 4.0, "IEEE 754: one rounding of the result, u, one of each operand"),
    "function": (
        16.0,
        16.0,
        "oneDNN's eltwise kernels: polynomials good to some units in the last place",
    ),
    "reduced": (64.0, 32.0, "Higham, Accuracy and Stability, 3.1: n u |a||b| with n = 48, sums of size 1"),
    "attention": (64.0, 64.0, "two products around a softmax: reduced, twice"),
}


def tolerance(op: str, dtype: str) -> Tolerance:
    """The tolerance of one operation in one element type."""
    group = next(name for name, ops in _GROUPS.items() if op in ops)
    if dtype not in U or (group == "moved" and dtype != "bf16"):
        return EXACT
    absolute, relative, source = _FLOAT[group]
    return Tolerance(absolute * U[dtype], relative * U[dtype], source)
