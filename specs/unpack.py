"""Low-bit weights of published checkpoints -> codes and scales, and from these float32 [out, in]: the arithmetic of
each layout in specs/packed.py. What a layout comes to is known from headers alone: `form_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specs.packed import Packed

if TYPE_CHECKING:
    import torch

    from specs.checkpoint import TensorInfo

Tensors = Mapping[str, "torch.Tensor"]
# Where the eight numbers of a word lie, by the order in which they are packed (AutoAWQ's GEMM layout).
_SCALES = ("weight_scale_inv", "weight_scale", "weights_scaling_factor")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Form:
    """How a weight [out, in] is held: types of codes and scales, the scales' shape, what shares one (empty: it
    broadcasts); `permuted`: groups of inputs that do not lie together (act-order).
    """

    type: str
    scale: str
    scale_shape: tuple[int, ...]
    block: tuple[int, ...] = ()
    zero: bool = False
    outer: bool = False
    permuted: bool = False


@dataclass(frozen=True)
class Codes:
    """(codes - zero) scale outer: codes [out, in], scale and zero of a form's scale_shape, outer [1].

    `groups` [in] is the group of each input, where these do not lie together; `factors` [in] what inputs are
    multiplied by first.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None
    outer: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    factors: torch.Tensor | None = None


def unpack(packed: Packed, read: Callable[..., torch.Tensor]) -> torch.Tensor:
    """The float32 weight of a quantized module; `read` gives a stored tensor."""
    parts, block = codes_of(packed, read), _block(packed)

    def wide(part: torch.Tensor) -> torch.Tensor:
        part = part.float()
        if parts.groups is not None:
            return part[:, parts.groups]
        for axis, size in enumerate(block):
            part = part.repeat_interleave(size, axis) if size > 1 else part
        return part[: parts.codes.shape[0], : parts.codes.shape[1]] if block else part

    exact = parts.codes.float()
    if parts.zero is not None:
        exact = exact - wide(parts.zero)
    scale = wide(parts.scale)
    result = exact * (scale if parts.outer is None else scale * parts.outer)
    return (result if parts.factors is None else result * parts.factors.float()).contiguous()


def codes_of(packed: Packed, read: Callable[..., torch.Tensor]) -> Codes:
    """The codes and scales of a quantized module, in the types of its form."""
    return _LAYOUTS[packed.layout](packed, {name: read(info) for name, info in packed.parts})


def words(packed: torch.Tensor, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """The numbers in 32-bit words along `axis` as bytes, the lowest bits first, or at the places that `order` gives."""
    import torch

    count = 32 // bits
    shifts = torch.arange(count, dtype=torch.int32) * bits
    packed = packed.movedim(axis, -1)
    numbers = ((packed[..., None] >> shifts) & (2**bits - 1)).to(torch.uint8)
    if order is not None:
        numbers = numbers[..., torch.argsort(torch.tensor(order))]
    result: torch.Tensor = numbers.flatten(-2).movedim(-1, axis)
    return result


def _shifted(codes: torch.Tensor, by: int) -> torch.Tensor:
    """Numbers 0.. as signed ones around zero."""
    import torch

    return (codes.to(torch.int16) - by).to(torch.int8)


# ---- forms: from headers ---------------------------------------------------------------------------------------


def form_of(packed: Packed) -> Form | str:
    """How the codes of a quantized module are held, or why they are not kept apart; no tensor is read."""
    parts, block = dict(packed.parts), _block(packed)
    if packed.layout == "nvfp4":
        return Form("f4e2m1", "f8e4m3", parts["weight_scale"].shape, block, outer=True)
    if packed.layout == "scaled":
        types = {"I8": "i8", "F8_E4M3": "f8e4m3"}
        stored, scale = parts["weight"].dtype, _scale_of(parts)
        if "weights_scaling_factor" in parts:
            stored = "F8_E4M3"
        if stored not in types:
            return f"its codes are stored as {stored}"
        shape = _matrix(scale.shape, parts["weight"].shape[0])
        return Form(types[stored], _float(scale), shape, block, zero="weight_zero_point" in parts)
    if packed.layout == "halves":
        if "prequant_scaling_factor" in parts:
            return "its inputs have factors of their own (AWQ), which are not kept apart from the weight"
        return Form("i4", _float(parts["weights_scaling_factor"]), parts["weights_scaling_factor"].shape, block)
    half = packed.bits < 8
    if packed.layout == "mixed":
        zero, scale = "zero.0" in parts, _scale_of_rank(parts)
        return Form(("u4" if zero else "i4") if half else "i8", _float(scale), _mixed_scales(packed), block, zero)
    if packed.layout == "packed":
        zero, scale = "weight_zero_point" in parts, parts["weight_scale"]
        kind, permuted = ("u4" if zero else "i4") if half else "i8", "weight_g_idx" in parts
        return Form(kind, _float(scale), scale.shape, block, zero=zero, permuted=permuted)
    groups, rows = parts["scales"].shape
    kind, zero = ("u4", True) if half else ("i8", True)
    if packed.symmetric:
        kind, zero = ("i4", False) if half else ("i8", False)
    return Form(kind, _float(parts["scales"]), (rows, groups), block, zero, permuted=packed.permuted)


def _float(info: TensorInfo) -> str:
    return "f16" if info.dtype == "F16" else "f32"  # bfloat16 widens exactly


def _scale_of(parts: Mapping[str, TensorInfo]) -> TensorInfo:
    return next(parts[name] for name in _SCALES if name in parts)


def _scale_of_rank(parts: Mapping[str, TensorInfo]) -> TensorInfo:
    return parts["per_channel_scale.0" if "per_channel_scale.0" in parts else "weights_scaling_factor.0"]


def _ranks(parts: Collection[str]) -> int:
    """How many ranks hold a part of a weight."""
    return sum(name.startswith("weight.") for name in parts)


def _mixed_scales(packed: Packed) -> tuple[int, int]:
    """The shape of the scales of all ranks: [out, groups of inputs]."""
    parts = dict(packed.parts)
    count, shape = _ranks(parts), _scale_of_rank(parts).shape
    rows, groups = (shape[0], 1) if len(shape) == 1 else (shape[1], shape[0])
    return (rows, groups * count) if packed.axis else (rows * count, groups)


def _matrix(shape: tuple[int, ...], rows: int) -> tuple[int, int]:
    """A scale's shape as one of two dims: of the whole weight or of each output where it has fewer."""
    if len(shape) == 2:
        return shape[0], shape[1]
    return (rows, 1) if shape == (rows,) else (1, 1)


def _block(packed: Packed) -> tuple[int, ...]:
    """The outputs and inputs that share a scale; empty where all inputs of an output do."""
    parts = dict(packed.parts)
    if packed.layout in ("awq", "gptq"):
        rows, width = parts["qweight"].shape
        width, groups = (rows, parts["scales"].shape[0]) if packed.layout == "awq" else (
            rows * (32 // packed.bits), parts["scales"].shape[0]
        )  # fmt: skip
        return _grouped(width, groups, packed.group)
    if packed.layout == "packed":
        width, groups = parts["weight_packed"].shape[1] * (32 // packed.bits), parts["weight_scale"].shape[-1]
        return _grouped(width, groups, packed.group)
    if packed.layout == "mixed":
        ranks = _ranks(parts) if packed.axis else 1
        return _grouped(parts["weight.0"].shape[0] * ranks, _mixed_scales(packed)[1], 0)
    if packed.layout == "halves":
        return _grouped(parts["weight"].shape[1], parts["weights_scaling_factor"].shape[1], 0)
    if packed.layout == "nvfp4":
        return _grouped(parts["weight"].shape[1] * 2, parts["weight_scale"].shape[1], 0)
    (rows, width), scale = parts["weight"].shape, _matrix(_scale_of(parts).shape, parts["weight"].shape[0])
    if scale[1] == 1 and scale[0] in (1, rows) and not packed.block:
        return ()
    sizes = packed.block or (-(-rows // scale[0]), -(-width // scale[1]))
    return sizes[0], sizes[1]


def _grouped(width: int, groups: int, stated: int) -> tuple[int, ...]:
    size = stated if stated > 0 and -(-width // stated) == groups else -(-width // groups)
    return () if groups == 1 else (1, size)


# ---- codes, layout by layout -----------------------------------------------------------------------------------


def _awq(packed: Packed, parts: Tensors) -> Codes:
    """qweight [in, out / 8], qzeros [in / g, out / 8], scales [in / g, out]."""
    codes = words(parts["qweight"], packed.bits, 1, AWQ_ORDER)
    zeros = words(parts["qzeros"], packed.bits, 1, AWQ_ORDER)
    return Codes(codes.T.contiguous(), _held(parts["scales"].T), zeros.T.contiguous())


def _gptq(packed: Packed, parts: Tensors) -> Codes:
    """qweight [in / 8, out], qzeros [groups, out / 8], scales [groups, out], g_idx [in]: the group of each input."""
    import torch

    from specs.errors import SpecRTError, Where

    codes = words(parts["qweight"], packed.bits, 0).T.contiguous()
    zeros = words(parts["qzeros"], packed.bits, 1).T.to(torch.int16) + packed.zero_offset
    middle, info = 2 ** (packed.bits - 1), dict(packed.parts)["qzeros"]
    groups = parts["g_idx"].long() if "g_idx" in parts else None
    block = _block(packed)
    width = block[1] if block else codes.shape[1]
    if groups is not None and bool((groups == torch.arange(codes.shape[1]) // width).all()):
        groups = None
    scale = _held(parts["scales"].T)
    if packed.symmetric:
        if bool((zeros != middle).any()):
            message = f"`{info.name}` holds zero points, but the configuration says that there are none (`sym`)"
            raise SpecRTError("CKPT-032", message, where=Where(str(info.file)))
        return Codes(_shifted(codes, middle), scale, None, None, groups)
    if packed.bits == 8:
        return Codes(_shifted(codes, middle), scale, (zeros - middle).to(torch.int16), None, groups)
    return Codes(codes, scale, zeros, None, groups)


def _scaled(packed: Packed, parts: Tensors) -> Codes:
    """8-bit weight [out, in] with a scale for all, for each output, for groups of inputs or for the stated blocks."""
    import torch

    del packed
    scale = next(parts[name] for name in _SCALES if name in parts)
    weight, zero = parts["weight"], parts.get("weight_zero_point")
    if "weights_scaling_factor" in parts:  # E4M3, by some writers under the name of int8
        weight = weight.view(torch.float8_e4m3fn)
    shape = _matrix(tuple(scale.shape), len(weight))
    return Codes(weight, _held(scale.reshape(shape)), None if zero is None else zero.reshape(shape))


def _words_of_signed(packed: Packed, parts: Tensors) -> Codes:
    """weight_packed [out, in / 8] of numbers moved up by half the range; zeros packed along the outputs."""
    half = 2 ** (packed.bits - 1)
    rows, columns = (int(size) for size in parts["weight_shape"])
    codes = words(parts["weight_packed"], packed.bits, 1)[:rows, :columns].contiguous()
    groups = parts["weight_g_idx"].long() if "weight_g_idx" in parts else None
    scale, zeros = _held(parts["weight_scale"]), parts.get("weight_zero_point")
    if zeros is None:
        return Codes(_shifted(codes, half), scale, None, None, groups)
    zeros = words(zeros, packed.bits, 0)[:rows] if zeros.shape[0] != rows else _raised(zeros, half)
    if packed.bits == 8:
        return Codes(_shifted(codes, half), scale, _shifted(zeros, half), None, groups)
    return Codes(codes, scale, zeros.contiguous(), None, groups)


def _raised(zeros: torch.Tensor, by: int) -> torch.Tensor:
    import torch

    return (zeros.to(torch.int16) + by).to(torch.uint8)


def _nvfp4(packed: Packed, parts: Tensors) -> Codes:
    """weight u8 [out, in / 2], two numbers a byte, the low half first; E4M3 scales of 16 inputs, one scale of all."""
    import torch

    del packed
    both = torch.stack((parts["weight"] & 15, parts["weight"] >> 4), -1).flatten(-2)
    return Codes(e2m1(both), parts["weight_scale"], None, parts["weight_scale_2"].float().reshape(1))


def _halves(packed: Packed, parts: Tensors) -> Codes:
    """weight [out / 2, in]: output 2 n in the low half of a byte, 2 n + 1 in the high one, in two's complement."""
    import torch

    del packed
    both = torch.stack((parts["weight"].view(torch.int8) << 4, parts["weight"].view(torch.int8)), 1) >> 4
    factors = parts.get("prequant_scaling_factor")
    return Codes(
        both.flatten(0, 1),
        _held(parts["weights_scaling_factor"]),
        factors=None if factors is None else factors.flatten(),
    )


def _mixed(packed: Packed, parts: Tensors) -> Codes:
    """Each rank's part (specs/mixed_gemm.py), one after the other along outputs or inputs."""
    import torch

    from specs.mixed_gemm import rank_of

    ranks = range(_ranks(parts))
    each = [
        rank_of(packed, {name.rpartition(".")[0]: part for name, part in parts.items() if name.endswith(f".{rank}")})
        for rank in ranks
    ]
    codes = torch.cat([part[0] for part in each], packed.axis)
    scale = torch.cat([part[1] for part in each], packed.axis)
    zeros = [part[2] for part in each if part[2] is not None]
    if not zeros:
        return Codes(codes, _held(scale))
    moved = 8 if packed.bits == 4 else 0
    return Codes(
        (codes + moved).to(torch.uint8 if moved else torch.int8), _held(scale), torch.cat(zeros, packed.axis) + moved
    )


def e2m1(bits: torch.Tensor) -> torch.Tensor:
    """The values of 4-bit floats by their bits 0..15, held in E4M3, which has all of them."""
    import torch

    from specs.weight_source import E2M1

    return torch.tensor(E2M1).to(torch.float8_e4m3fn).view(torch.uint8)[bits.long()].view(torch.float8_e4m3fn)


def _held(scale: torch.Tensor) -> torch.Tensor:
    """A scale in float16 or float32."""
    import torch

    return (scale if scale.dtype is torch.float16 else scale.float()).contiguous()


_LAYOUTS: dict[str, Callable[[Packed, Tensors], Codes]] = {
    "awq": _awq,
    "gptq": _gptq,
    "scaled": _scaled,
    "packed": _words_of_signed,
    "nvfp4": _nvfp4,
    "halves": _halves,
    "mixed": _mixed,
}
