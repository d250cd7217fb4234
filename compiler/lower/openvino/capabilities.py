"""What OpenVINO's CPU plugin does with each operation and element type, as data. One verdict for each pair.

16-bit floats are held in float32 between operations, with weights stored in 16 bits: the plugin computes in the
precision that INFERENCE_PRECISION_HINT names, and rounds where its kernels do.
"""

from __future__ import annotations

from collections.abc import Mapping

from compiler.ir.core import Equation
from compiler.ir.types import DTYPES
from compiler.lower.capability import Decompose, Emit, Types, Unsupported, Verdict, each, key_dtype

FLOATS = ("f32", "bf16", "f16")
INTEGERS = ("i32",)
NO_FLOAT8 = Unsupported("the CPU plugin has no arithmetic on 8-bit floats")
NO_STORED = Unsupported("a format of stored weights, which `dequantize` reads; the CPU plugin computes nothing in it")
RAGGED = Unsupported("blocks of an activation must divide its row")
UNPACKED = Decompose("of a weight in blocks that do not divide it: widened to float32 when the bundle is written")
NO_CODES = Unsupported("no format of codes")
NO_INT4 = Unsupported("4-bit integers occur as stored weights only, which need an operation that unpacks them")
NO_INT64 = Unsupported("the CPU plugin narrows 64-bit integers to 32 bits")
NO_INT8 = Unsupported("the CPU plugin computes 8-bit integers in wider types, so overflow would differ")
NO_BOOL = Unsupported("no arithmetic on bool")
NO_STATE = Unsupported("the paged cache holds float32 or bfloat16, as the engine computes, or rows of u8 codes")
NO_FLOAT8_CACHE = Unsupported("the plugin's paged cache has no FP8 codes; they are rounded before a wider cache")
NO_RANKS = Unsupported("the CPU is one device, whose cores one process uses: nothing is shared by several")
NO_LINEAR = Unsupported("the CPU has a paged cache and packed tokens; a linear cache is for TensorRT's own layers")
NO_INT_DIV = Unsupported("division of integers rounds differently in PyTorch (true division) and OpenVINO (floor)")

_REST: dict[str, Verdict] = {
    "f8e4m3": NO_FLOAT8, "i64": NO_INT64, "i8": NO_INT8, "u8": NO_INT8, "i4": NO_INT4, "u4": NO_INT4,
    "f4e2m1": NO_STORED, "f8e8m0": NO_STORED,
}  # fmt: skip
_TYPES = Types(FLOATS, INTEGERS, ("i8", "u8", "bool"), _REST, NO_BOOL)
_float, _number, _any = _TYPES.float, _TYPES.number, _TYPES.any

_PAIRS = Decompose("x * cos + turned(x) * sin, which the plugin fuses into its rotary operation for style `half`")
_EXPERTS = Decompose("rows sorted by the chosen matrix, and one product for each matrix that has any")
_ATTENTION = Decompose("the opset's attention where it has the features, else products, mask and softmax in float32")

_WEIGHT = Emit("kept in the checkpoint's type where that is narrower: widening is exact")
_COMPRESSED = Emit("of a weight: codes stay as they are, the plugin's product reads them")
_QUANTIZE = Decompose("division, rounding and clamping in float32; 4-bit codes are held in float32")

TABLE: Mapping[str, Mapping[str, Verdict]] = {
    "add": _number(Emit()),
    "sub": _number(Emit()),
    "mul": _number(Emit()),
    "div": {**_number(Emit()), **each(NO_INT_DIV, *INTEGERS)},
    "maximum": _number(Emit()),
    "minimum": _number(Emit()),
    "compare": {**_number(Emit()), "bool": NO_BOOL},
    "and": each(Emit(), "bool"),
    "or": each(Emit(), "bool"),
    "where": _any(Emit()),
    "exp": _float(Emit()),
    "rsqrt": _float(Decompose("1 / sqrt(x), the form that the plugin's norm fusion knows")),
    "cos": _float(Emit()),
    "sin": _float(Emit()),
    "tanh": _float(Emit()),
    "erf": _float(Emit()),
    "sigmoid": _float(Emit()),
    "relu": _float(Emit()),
    "silu": _float(Emit()),
    "gelu": _float(Emit()),
    "cast": _any(Emit("between floats nothing happens: they are held in float32")),
    "matmul": _float(Emit()),
    "gather": _any(Emit("rows of a stored weight are read in its own type, then widened")),
    "mean": _float(Emit()),
    "sum": _float(Emit()),
    "softmax": _float(Emit("a sink as exponentials over their sum and its own")),
    "reshape": _any(Emit()),
    "transpose": _any(Emit()),
    "concat": _any(Emit()),
    "slice": _any(Emit()),
    "top_k": _float(Emit()),
    "take": _any(Emit()),
    "gather_matmul": _float(_EXPERTS),
    "rms_norm": _float(Decompose("x * (1 / sqrt(mean(x^2) + eps)) * weight, which the plugin fuses")),
    "layer_norm": _float(Decompose("mean-variance normalisation, then weight and bias")),
    "rotate": _float(_PAIRS),
    "attention": _float(_ATTENTION),
    "paged_attention": {**_float(Emit()), "f16": NO_STATE},  # by its features: PAGED_NATIVE
    "update_cache": each(NO_LINEAR, *DTYPES),
    "cached_attention": _float(NO_LINEAR),
    "all_reduce": _float(NO_RANKS),
    "all_gather": each(NO_RANKS, *DTYPES),
    "weight": {**_any(_WEIGHT), **each(_WEIGHT, "f8e4m3", "i4", "u4", "f4e2m1", "f8e8m0")},
    "quantize": _float(_QUANTIZE),
    "dequantize": {
        **each(NO_CODES, *DTYPES),
        **each(_COMPRESSED, "i8", "u8", "i4", "u4", "f4e2m1"),
        "f8e4m3": Decompose("of a weight: stored in 8 bits, widened to float32 when the bundle is loaded"),
    },
    "row_scale": _float(Decompose("maximum of |x| by reduction")),
    "state": {**_any(NO_STATE), **each(Emit("an input whose memory the runtime keeps"), "f32", "bf16", "u8")},
    "const": _any(Emit()),
    "repeat": _any(Decompose("every round is written out with its own weights")),
}

# Features of paged attention that PagedAttentionExtension computes, alone or together. Measured by tests/conformance.
PAGED_NATIVE = (
    frozenset[str](),
    frozenset({"window"}),
    frozenset({"slopes"}),
    frozenset({"sinks"}),
    frozenset({"window", "sinks"}),
)
PAGED_GATHERED = Decompose("reads the cache's blocks by gather and attends with plain operations")


def paged_features(equation: Equation) -> frozenset[str]:
    """The features of an attention that decide how it is computed."""
    found = {name for name in ("window", "softcap", "slopes", "bf16_bias") if equation.attr.get(name) is not None}
    operands = dict(enumerate(equation.args))
    if operands.get(10) is not None:
        found.add("prefix")
    if operands.get(11) is not None:
        found.add("sinks")
    if equation.attr.get("causal") is not True:
        found.add("not_causal")
    return frozenset(found)


def ragged(equation: Equation) -> bool:
    """Whether a block of an operation on codes does not divide the dim that it is of."""
    block, shape = equation.attr.get("block"), equation.values[0].type.shape
    sizes = block if isinstance(block, tuple) else () if block is None else (block,)
    dims = shape[len(shape) - len(sizes) :]
    return any(size != 1 and int(str(dim)) % int(str(size)) for dim, size in zip(dims, sizes, strict=True))


def verdict(equation: Equation) -> Verdict:
    """Emit, decompose or unsupported, for one equation."""
    row = TABLE[equation.op]
    found = row[key_dtype(equation)]
    if equation.op == "cast" and not isinstance(found, Unsupported):
        to = TABLE["cast"][equation.results[0].type.dtype]
        return to if isinstance(to, Unsupported) else found
    if equation.op in ("quantize", "row_scale", "dequantize") and isinstance(found, Emit | Decompose):
        return (UNPACKED if equation.op == "dequantize" else RAGGED) if ragged(equation) else found
    if equation.op == "paged_attention" and equation.attr.get("codes") == "f8e4m3":
        return NO_FLOAT8_CACHE
    if equation.op == "paged_attention" and isinstance(found, Emit) and paged_features(equation) not in PAGED_NATIVE:
        return PAGED_GATHERED
    return found
