"""Low-bit weights of published checkpoints -> float32 [out, in]: the arithmetic of each layout in specs/packed.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from specs.packed import Packed

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]
# Where the eight numbers of a word lie, by the order in which they are packed (AutoAWQ's GEMM layout).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack(packed: Packed, read: Callable[..., torch.Tensor]) -> torch.Tensor:
    """The weight of a quantized module; `read` gives a stored tensor."""
    return _LAYOUTS[packed.layout](packed, {name: read(info) for name, info in packed.parts})


def words(packed: torch.Tensor, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """The numbers in 32-bit words along `axis`, the lowest bits first, or at the places that `order` gives."""
    import torch

    count = 32 // bits
    shifts = torch.arange(count, dtype=torch.int32) * bits
    packed = packed.movedim(axis, -1)
    numbers = (packed[..., None] >> shifts) & (2**bits - 1)
    if order is not None:
        numbers = numbers[..., torch.argsort(torch.tensor(order))]
    result: torch.Tensor = numbers.flatten(-2).movedim(-1, axis)
    return result


def _awq(packed: Packed, parts: Tensors) -> torch.Tensor:
    """qweight [in, out / 8], qzeros [in / g, out / 8], scales [in / g, out]."""
    codes = words(parts["qweight"], packed.bits, 1, AWQ_ORDER)
    zeros = words(parts["qzeros"], packed.bits, 1, AWQ_ORDER)
    group = codes.shape[0] // zeros.shape[0]
    zeros, scales = (part.repeat_interleave(group, 0) for part in (zeros, parts["scales"].float()))
    return ((codes - zeros) * scales).T.contiguous()


def _gptq(packed: Packed, parts: Tensors) -> torch.Tensor:
    """qweight [in / 8, out], qzeros [groups, out / 8], scales [groups, out], g_idx [in]: the group of each input."""
    import torch

    codes = words(parts["qweight"], packed.bits, 0)
    zeros = words(parts["qzeros"], packed.bits, 1) + packed.zero_offset
    groups = len(parts["scales"])
    of_input = parts["g_idx"].long() if "g_idx" in parts else torch.arange(len(codes)) // -(-len(codes) // groups)
    return ((codes - zeros[of_input]) * parts["scales"].float()[of_input]).T.contiguous()


def _scaled(packed: Packed, parts: Tensors) -> torch.Tensor:
    """8-bit weight [out, in] with a scale for all, for each output, for groups of inputs or for the stated blocks."""
    scale = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
    weight = parts["weight"].float()
    zero = parts.get("weight_zero_point")
    if zero is not None:
        weight = weight - _over(zero.float(), weight, packed.block)
    return weight * _over(scale.float(), weight, packed.block)


def _over(scale: torch.Tensor, weight: torch.Tensor, block: tuple[int, ...]) -> torch.Tensor:
    """A scale repeated over the weight's blocks, the last of which may be cut off."""
    if scale.ndim < 2:
        return scale.reshape(-1, 1) if scale.numel() == len(weight) else scale.reshape(1, 1)
    sizes = block or tuple(-(-size // count) for size, count in zip(weight.shape, scale.shape, strict=True))
    wide = scale.repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1)
    return wide[: weight.shape[0], : weight.shape[1]]


def _words_of_signed(packed: Packed, parts: Tensors) -> torch.Tensor:
    """weight_packed [out, in / 8] of numbers moved up by half the range; zeros packed along the outputs."""
    half = 2 ** (packed.bits - 1)
    rows, columns = (int(size) for size in parts["weight_shape"])
    codes = (words(parts["weight_packed"], packed.bits, 1) - half)[:rows, :columns].float()
    scale = parts["weight_scale"].float()
    group = -(-columns // scale.shape[-1])
    if "weight_g_idx" in parts:
        of_input = parts["weight_g_idx"].long()
        scale = scale[:, of_input]
    else:
        scale = scale.repeat_interleave(group, 1)[:, :columns]
    if "weight_zero_point" in parts:
        zeros = parts["weight_zero_point"]
        if zeros.shape[0] != rows:
            zeros = words(zeros, packed.bits, 0)[:rows] - half
        zeros = zeros.float()
        codes = codes - (
            zeros[:, of_input] if "weight_g_idx" in parts else zeros.repeat_interleave(group, 1)[:, :columns]
        )
    result: torch.Tensor = codes * scale
    return result


def _nvfp4(packed: Packed, parts: Tensors) -> torch.Tensor:
    """weight u8 [out, in / 2], two numbers a byte, the low half first; E4M3 scales of 16 inputs, one scale of all."""
    import torch

    from specs.weight_source import E2M1

    del packed
    table = torch.tensor(E2M1)
    both = torch.stack((parts["weight"] & 15, parts["weight"] >> 4), -1).flatten(-2)
    scale = parts["weight_scale"].float() * parts["weight_scale_2"].float()
    result: torch.Tensor = table[both.long()] * scale.repeat_interleave(both.shape[1] // scale.shape[1], 1)
    return result


_LAYOUTS: dict[str, Callable[[Packed, Tensors], torch.Tensor]] = {
    "awq": _awq,
    "gptq": _gptq,
    "scaled": _scaled,
    "packed": _words_of_signed,
    "nvfp4": _nvfp4,
}
