"""Low-bit number formats, bit for bit: rounding to them, their codes, and half bytes packed two to a byte.

Sources: E4M3 arXiv:2209.05433; E2M1, E8M0 and blocks of 32: OCP Microscaling Formats v1.0, sections 5 and 6.
Values of a format are held in a PyTorch tensor one to an element (`interpreter.torch_dtype`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specs.errors import SpecRTError
from specs.weight_source import E2M1

if TYPE_CHECKING:
    import torch

# The finite range of what `quantize` can make; a value beyond it becomes the nearest end.
RANGE: dict[str, tuple[float, float]] = {
    "i8": (-128, 127),
    "u8": (0, 255),
    "i4": (-8, 7),
    "u4": (0, 15),
    "f8e4m3": (-448.0, 448.0),
    "f4e2m1": (-6.0, 6.0),
}
# The exponent of the largest power of two in a format: what a shared power-of-two scale is chosen by.
LARGEST_EXPONENT = {"f8e4m3": 8, "f4e2m1": 2}
HALF_BYTES = frozenset({"i4", "u4", "f4e2m1"})


def round_to(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """The values of a format nearest to float32 `x`, ties to even, held as the interpreter does; the ends saturate.

    NaN stays NaN in E4M3 and becomes 0 in formats that have none. Raises SpecRTError IR-004 for other types.
    """
    import torch

    if dtype not in RANGE:
        raise SpecRTError("IR-004", f"`quantize` makes {', '.join(RANGE)}, not `{dtype}`")
    low, high = RANGE[dtype]
    x = x.float()
    if dtype == "f8e4m3":
        return x.clamp(low, high).to(torch.float8_e4m3fn)
    x = x.nan_to_num(0.0, high, low).clamp(low, high)
    if dtype == "f4e2m1":
        return _nearest_e2m1(x).to(torch.float8_e4m3fn)
    return x.round().to(torch.int8 if dtype in ("i8", "i4") else torch.uint8)


def _nearest_e2m1(x: torch.Tensor) -> torch.Tensor:
    """E2M1 has a step of 0.5 below 2, of 1 below 4, and of 2 above."""
    import torch

    size = x.abs()
    step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    return torch.copysign((size / step).round() * step, x)


def power_of_two_scale(largest: torch.Tensor, dtype: str) -> torch.Tensor:
    """The E8M0 scale of a block whose largest magnitude is `largest`: 2^(floor(log2 largest) - emax) (OCP MX, 6.3)."""
    import torch

    _, exponent = torch.frexp(largest.float())  # largest = m * 2^exponent with m in [0.5, 1)
    exponent = torch.where(largest > 0, exponent - 1 - LARGEST_EXPONENT[dtype], torch.zeros_like(exponent))
    return (exponent.clamp(-127, 127) + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def codes(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """The bits of half-byte values as uint8 0..15."""
    import torch

    if dtype != "f4e2m1":
        return values.view(torch.uint8) & 15
    table = torch.tensor(E2M1[:8])  # the fourth bit is the sign
    exact = values.float()
    sign = torch.signbit(exact).to(torch.uint8) << 3
    return torch.searchsorted(table, exact.abs()).to(torch.uint8) | sign


def from_codes(bits: torch.Tensor, dtype: str) -> torch.Tensor:
    """Half-byte values from their bits 0..15, held as the interpreter does."""
    import torch

    bits = bits.view(torch.uint8)
    if dtype == "u4":
        return bits
    if dtype == "i4":
        return ((bits << 4).view(torch.int8)) >> 4
    return torch.tensor(E2M1)[bits.long()].to(torch.float8_e4m3fn)


def pack(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Half-byte values [*N,M] as bytes [*N,ceil(M/2)]: the even element in the low half."""
    import torch

    bits = codes(values, dtype)
    if bits.shape[-1] % 2:
        bits = torch.nn.functional.pad(bits, (0, 1))
    return bits[..., 0::2] | (bits[..., 1::2] << 4)


def unpack(packed: torch.Tensor, dtype: str) -> torch.Tensor:
    """The values [*N,2M] of bytes [*N,M] that `pack` made."""
    import torch

    both = torch.stack((packed & 15, packed >> 4), -1)
    return from_codes(both.reshape(*packed.shape[:-1], -1), dtype)


def spread(scale: Any, shape: tuple[int, ...], block: tuple[int, ...]) -> Any:
    """A tensor with one element for each block, repeated to `shape`; without `block` it broadcasts as it is."""
    for axis, size in enumerate(block, start=-len(block)):
        if size == 1:
            continue
        place = scale.ndim + axis
        wide = scale.unsqueeze(place + 1).expand(*scale.shape[: place + 1], size, *scale.shape[place + 1 :])
        scale = wide.flatten(place, place + 1).narrow(place, 0, shape[axis])
    return scale
