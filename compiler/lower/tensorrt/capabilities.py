"""What TensorRT does with each operation and element type, by version, as data. One verdict for each triple."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from compiler.ir.core import Equation
from compiler.ir.types import DTYPES, STORED
from compiler.lower.capability import Decompose, Emit, Types, Unsupported, Verdict, each, key_dtype
from compiler.lower.tensorrt.dialects import Dialect

FLOATS = ("f32", "f16", "bf16")
INTEGERS = ("i32", "i64")
NO_BF16_BIAS = Unsupported("attention inside an engine adds linear biases in float32, not in bfloat16")
STATE = Emit("not in an engine: memory that the runtime owns, read and written by the attention kernel")
ROW = Emit("an input and an output of the engine at one address: a row of places for each sequence")
RANKS = Emit("not in an engine: a step between two, in which GPUs exchange values")
KERNEL = Emit("not in an engine: a kernel step between two, which appends to the paged cache and attends")
WEIGHT = Emit("an input of the engine, bound at load; with `weights: baked` a constant")
NO_FLOAT8 = Unsupported("8-bit floats occur behind a quantize operation only, which has rules of its own")
NO_INT8 = Unsupported("8-bit integers occur behind a quantize operation only")
NO_UINT8 = Unsupported("UINT8 is a type of inputs and outputs only")
NO_LAYER = Unsupported("TensorRT has layers for a linear cache from 10.16 on")
NO_STORED = Unsupported("a type of stored codes and scales only, which need an operation that unpacks them")
NO_CODES = Unsupported("no format of codes that TensorRT has a layer for")
NO_ZERO = Unsupported("TensorRT's quantization is symmetric: no zero points")
NO_BLOCKS = Unsupported("TensorRT has blocks of 64 or 128 INT4, of 16 NVFP4 and of 32 MXFP8 along a row, no others")
NO_HALF_BYTE_ROWS = Unsupported("TensorRT has 4-bit codes in blocks only")
NO_BOOL = Unsupported("no arithmetic on bool")
NO_INT_DIV = Unsupported("division of integers rounds differently in PyTorch (true division) and TensorRT (to zero)")

_REST: dict[str, Verdict] = {
    "f8e4m3": NO_FLOAT8,
    "i8": NO_INT8,
    "u8": NO_UINT8,
    **each(NO_STORED, *sorted(STORED)),
}
_TYPES = Types(FLOATS, INTEGERS, ("bool",), _REST, NO_BOOL)
_float, _number, _any = _TYPES.float, _TYPES.number, _TYPES.any

_RMS = Decompose("x / sqrt(mean(x^2) + eps), in float32, rounded to the operand's type, times weight")
_LAYER = Decompose("(x - mean) / sqrt(var + eps), in float32, rounded to the operand's type, times weight, plus bias")
_ATTENTION = Decompose("products, mask and softmax, the scores in float32")
_OVER_CACHE = Decompose("products, mask and softmax over the whole cache in float32: softcap, or values of other width")
_EXPERTS = Decompose(
    "a program of kernels: rows sorted by expert, each times its own; with `weights: baked`, and what kernels do not "
    "know: every row times every expert, then the chosen"
)
_CODES = Emit("a power of two is the layer's scale, what is left of ours is multiplied with the product")
_PAIRS = Decompose("slices, products with cos and sin in float32, concatenation")

# Without regard to the version; `table` takes out what a version lacks.
_TABLE: Mapping[str, Mapping[str, Verdict]] = {
    "add": _number(Emit()),
    "sub": _number(Emit()),
    "mul": _number(Emit()),
    "div": {**_number(Emit()), **each(NO_INT_DIV, *INTEGERS)},
    "maximum": _number(Emit()),
    "minimum": _number(Emit()),
    "compare": _number(Decompose("EQUAL, LESS or GREATER; le, ge and ne as the negation of another")),
    "and": each(Emit(), "bool"),
    "or": each(Emit(), "bool"),
    "where": _any(Emit()),
    "exp": _float(Emit()),
    "rsqrt": _float(Decompose("1 / sqrt(x)")),
    "cos": _float(Emit()),
    "sin": _float(Emit()),
    "tanh": _float(Emit()),
    "erf": _float(Emit()),
    "sigmoid": _float(Emit()),
    "relu": _float(Emit()),
    "silu": _float(Decompose("x * sigmoid(x)")),
    "gelu": _float(Emit()),
    "cast": _any(Emit()),
    "matmul": _float(Emit()),
    "gather": _any(Emit()),
    "mean": _float(Emit()),
    "sum": _float(Emit()),
    "softmax": _float(Decompose("in float32, rounded to the operand's type")),
    "reshape": _any(Emit()),
    "transpose": _any(Emit()),
    "concat": _any(Emit()),
    "slice": _any(Emit()),
    "rms_norm": _float(_RMS),
    "layer_norm": _float(Emit()),
    "rotate": _float(_PAIRS),
    "attention": _float(_ATTENTION),
    "paged_attention": _float(KERNEL),
    "update_cache": {**_any(Unsupported("a cache holds floats")), **each(Emit("in place"), *FLOATS)},
    "cached_attention": _float(Emit("its own layer; what a query sees, linear biases and sinks as a mask")),
    "all_reduce": _float(RANKS),
    "all_gather": _any(RANKS),
    "top_k": _float(Emit("which of equals comes first is TensorRT's choice")),
    "take": _any(Emit()),
    "gather_matmul": _float(_EXPERTS),
    "quantize": _float(Emit("by a power of two, after division by what is left of the scale")),
    "dequantize": {**each(NO_CODES, *DTYPES), **each(_CODES, "i8", "f8e4m3", "i4", "f4e2m1")},
    "row_scale": _float(Decompose("maximum of |x| by reduction; powers of two by the layer that quantizes by blocks")),
    "weight": {**_any(WEIGHT), **each(WEIGHT, "i8", "f8e4m3", "i4", "f4e2m1", "f8e8m0")},
    "state": {**_any(Unsupported("a cache holds floats")), **each(STATE, *FLOATS, "u8")},
    "const": _any(Emit()),
    "repeat": _any(Decompose("every round is written out; equal rounds share one engine")),
}  # fmt: skip


@cache
def table(dialect: Dialect) -> Mapping[str, Mapping[str, Verdict]]:
    """The verdicts of one version."""
    found: dict[str, dict[str, Verdict]] = {op: dict(row) for op, row in _TABLE.items()}
    if not dialect.gelu:
        found["gelu"] = _float(Decompose("by erf or tanh, in float32, rounded to the operand's type"))
    if dialect.normalization is None:
        found["layer_norm"] = _float(_LAYER)
    if dialect.rotary:
        found["rotate"] = _float(Emit("in float32, rounded to the operand's type"))
    if dialect.attention is None:
        for op in ("update_cache", "cached_attention"):
            found[op].update(each(NO_LAYER, *FLOATS))
    for op, row in found.items():
        for dtype, verdict in row.items():
            if (op, dtype) == ("state", "u8"):  # rows of an 8-bit cache: no network sees them
                continue
            if not isinstance(verdict, Unsupported) and dtype not in dialect.dtypes:
                row[dtype] = Unsupported(f"TensorRT {dialect.version} has no {dtype}")
    return found


def verdict(equation: Equation, dialect: Dialect) -> Verdict:
    """Emit, decompose or unsupported, for one equation."""
    rows = table(dialect)
    found = rows[equation.op][key_dtype(equation)]
    if equation.op in ("attention", "cached_attention") and equation.attr.get("bf16_bias") is not None:
        return NO_BF16_BIAS
    if equation.op == "state" and found is STATE and equation.result.type.shape[0] == "B":
        return ROW
    if equation.op == "cached_attention" and isinstance(found, Emit) and by_products(equation):
        return _OVER_CACHE
    if equation.op in ("quantize", "dequantize", "row_scale") and not isinstance(found, Unsupported):
        return _quantized(equation, dialect) or found
    if equation.op == "cast" and not isinstance(found, Unsupported):
        to = rows["cast"][equation.results[0].type.dtype]
        return to if isinstance(to, Unsupported) else found
    return found


def by_products(equation: Equation) -> bool:
    """Whether an attention over a linear cache asks for what TensorRT's layer has not: it is written as products."""
    _, k, v = equation.values[:3]
    return equation.attr.get("softcap") is not None or k.type.shape != v.type.shape


# Codes and size of the blocks that share a scale, and the scale's type.
BLOCKS = frozenset({
    ("i4", 64, "f32"), ("i4", 64, "f16"), ("i4", 128, "f32"), ("i4", 128, "f16"),
    ("f4e2m1", 16, "f8e4m3"), ("f8e4m3", 32, "f8e8m0"),
})  # fmt: skip


def _quantized(equation: Equation, dialect: Dialect) -> Unsupported | None:
    """Why a version has no layer for these codes and scales, or None."""
    if equation.op == "row_scale":
        return _row_scale(equation, dialect)
    codes = (equation.results if equation.op == "quantize" else equation.values)[0].type
    scale, block = equation.values[1].type.dtype, equation.attr.get("block")
    if lacking := {codes.dtype, scale} - dialect.dtypes:
        return Unsupported(f"TensorRT {dialect.version} has no {' and no '.join(sorted(lacking))}")
    if len(equation.args) > 2 and equation.args[2] is not None:
        return NO_ZERO
    if isinstance(block, tuple):
        plain = all(size == 1 for size in block[:-1]) and int(str(codes.shape[-1])) % int(str(block[-1])) == 0
        plain = plain and any(dim != 1 for dim in equation.values[1].type.shape)  # one block: a scale of the tensor
        return None if plain and (codes.dtype, block[-1], scale) in BLOCKS else NO_BLOCKS
    return None if codes.dtype in ("i8", "f8e4m3") else NO_HALF_BYTE_ROWS


def _row_scale(equation: Equation, dialect: Dialect) -> Unsupported | None:
    block, width = equation.attr.get("block"), int(str(equation.values[0].type.shape[-1]))
    if block is not None and width % int(str(block)):
        return NO_BLOCKS
    if equation.attr.get("scale", "f32") == "f32":
        return None
    if (equation.attr["dtype"], block) != ("f8e4m3", 32):
        return NO_BLOCKS
    return None if "f8e8m0" in dialect.dtypes else Unsupported(f"TensorRT {dialect.version} has no f8e8m0")
