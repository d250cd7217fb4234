"""To low-bit formats and back: codes and their scales. How the formats round is in compiler/ir/formats.py."""

from __future__ import annotations

from typing import Any

from compiler.ir.formats import LARGEST_EXPONENT, RANGE
from compiler.ir.ops.registry import TypeRuleError, broadcast, op
from compiler.ir.types import FLOATS, Dim, TensorType

_SCALES = (*sorted(FLOATS), "f8e8m0")


def _check_scale(x: TensorType, scale: TensorType, zero: TensorType | None, block: tuple[int, ...]) -> None:
    if scale.dtype not in _SCALES:
        raise TypeRuleError(f"a scale is one of {', '.join(_SCALES)}, got {scale.dtype}")
    if block and (len(block) > x.rank or any(size < 1 for size in block)):
        raise TypeRuleError(f"blocks {block} do not fit {x}")
    wanted: list[Dim] = list(x.shape)
    for axis, size in enumerate(block, start=-len(block)):
        whole = x.shape[axis]
        if size == 1:
            continue
        if not isinstance(whole, int):
            raise TypeRuleError(f"blocks along the symbolic dim `{whole}`")
        wanted[axis] = -(-whole // size)
    for name, part in (("scale", scale), ("zero", zero)):
        if part is None:
            continue
        if block and part.shape != tuple(wanted):
            raise TypeRuleError(f"`{name}` of {x} in blocks {block} must have shape {wanted}, got {part}")
        if not block and broadcast(x.shape, part.shape) != x.shape:
            raise TypeRuleError(f"`{name}` {part} does not broadcast to {x}")


def _quantize(
    x: TensorType, scale: TensorType, zero: TensorType | None = None, outer: TensorType | None = None, *,
    dtype: str, block: tuple[int, ...] = (),
) -> tuple[TensorType, ...]:  # fmt: skip
    if dtype not in RANGE:
        raise TypeRuleError(f"`quantize` makes {', '.join(RANGE)}, not {dtype}")
    if not x.is_float:
        raise TypeRuleError(f"`quantize` takes a float tensor, got {x}")
    _check_scale(x, scale, zero, block)
    _check_outer(outer)
    return (x.with_dtype(dtype),)


def _check_outer(outer: TensorType | None) -> None:
    if outer is not None and (outer.dtype != "f32" or outer.shape != (1,)):
        raise TypeRuleError(f"`outer` is one number, f32[1], got {outer}")


@op("x: F[*N], scale: T1[*S], zero?: T2[*Z], outer?: f32[1] -> T[*N]", infer=_quantize)
def quantize(
    x: Any, scale: Any, zero: Any = None, outer: Any = None, *, dtype: str, block: tuple[int, ...] = ()
) -> Any:
    """round(x / (scale outer)) + zero in a low-bit type, ties to even, saturating; one scale for each `block`.

    `block` has the block's size in the last dims, and the scale's dims are ceil(dim / size); without it the scale
    broadcasts. NaN stays NaN in f8e4m3 and becomes 0 elsewhere. `outer`: a second scale for the whole tensor (NVFP4).
    """
    from compiler.ir.formats import round_to, spread

    step = spread(scale.float(), x.shape, block) * (1.0 if outer is None else outer)
    exact = x.float() / step
    if zero is not None:
        exact = exact.round() + spread(zero.float(), x.shape, block)
    return round_to(exact, dtype)


def _dequantize(
    codes: TensorType, scale: TensorType, zero: TensorType | None = None, outer: TensorType | None = None, *,
    dtype: str, block: tuple[int, ...] = (),
) -> tuple[TensorType, ...]:  # fmt: skip
    if codes.dtype not in RANGE:
        raise TypeRuleError(f"codes are one of {', '.join(RANGE)}, got {codes.dtype}")
    if dtype not in FLOATS:
        raise TypeRuleError(f"`dequantize` makes {', '.join(sorted(FLOATS))}, not {dtype}")
    _check_scale(codes, scale, zero, block)
    _check_outer(outer)
    return (codes.with_dtype(dtype),)


@op("codes: T1[*N], scale: T2[*S], zero?: T3[*Z], outer?: f32[1] -> F[*N]", infer=_dequantize)
def dequantize(
    codes: Any, scale: Any, zero: Any = None, outer: Any = None, *, dtype: str, block: tuple[int, ...] = ()
) -> Any:
    """(codes - zero) scale outer, computed in float32, rounded to `dtype`; scales and blocks as in `quantize`."""
    from compiler.ir.formats import spread
    from compiler.ir.interpreter import torch_dtype

    step = spread(scale.float(), codes.shape, block) * (1.0 if outer is None else outer)
    exact = codes.float()
    if zero is not None:
        exact = exact - spread(zero.float(), codes.shape, block)
    return (exact * step).to(torch_dtype(dtype))


def _row_scale(x: TensorType, *, dtype: str, scale: str = "f32", block: int | None = None) -> tuple[TensorType, ...]:
    size = x.shape[-1] if x.rank else None
    if dtype not in RANGE or scale not in ("f32", "f8e8m0") or not isinstance(size, int) or not x.is_float:
        raise TypeRuleError(f"no scale of {scale} for {dtype} from {x}")
    if scale == "f8e8m0" and dtype not in LARGEST_EXPONENT:
        raise TypeRuleError(f"a power-of-two scale is for {', '.join(LARGEST_EXPONENT)}, not {dtype}")
    if block is not None and block < 1:
        raise TypeRuleError(f"blocks of {block}")
    return (TensorType(scale, (*x.shape[:-1], 1 if block is None else -(-size // block))),)


@op("x: F[*N,M] -> T[*N,K]", infer=_row_scale)
def row_scale(x: Any, *, dtype: str, scale: str = "f32", block: int | None = None) -> Any:
    """The scale that takes the largest |x| of a row, or of each `block` of it, to the largest `dtype`.

    f32: max|x| / max(dtype), at least 1e-12; f8e8m0: 2^(floor(log2 max|x|) - emax) (OCP MX, 6.3).
    """
    import torch

    from compiler.ir.formats import power_of_two_scale

    size = x.float().abs()
    width = size.shape[-1] if block is None else block
    size = torch.nn.functional.pad(size, (0, -size.shape[-1] % width))
    largest = size.reshape(*size.shape[:-1], -1, width).amax(-1)
    if scale == "f8e8m0":
        return power_of_two_scale(largest, dtype)
    return (largest / RANGE[dtype][1]).clamp_min(1e-12)
