"""Where a weight's numbers lie, and how they are read: pieces of fused tensors, stacks of tensors, packed formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from specs.checkpoint import TensorInfo
from specs.errors import SpecRTError, Where

if TYPE_CHECKING:
    import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of a 4-bit float by its bits (OCP Microscaling Formats 1.0, section 5.3.3)."""


@dataclass(frozen=True)
class Select:
    """What to take of a stored tensor: transpose it, view its rows as [outer, axis, inner], keep `start:stop`
    of the axis, of every `copies`th step of the first: those between hold the same.
    """

    transpose: bool = False
    outer: int = 1
    axis: int = 1
    inner: int = 1
    start: int = 0
    stop: int = 1
    copies: int = 1
    where: Where | None = None  # the file, for messages about copies

    @property
    def whole(self) -> bool:
        """Whether all rows are taken."""
        return self.stop - self.start == self.axis


@dataclass(frozen=True)
class WeightSource:
    """Where one weight comes from: `tensor`, or a `stack` of tensors, one for each index of the first axis; with
    `scales` the tensor is MXFP4 blocks. `copies` must hold the same numbers.
    """

    tensor: TensorInfo
    select: Select
    shape: tuple[int, ...]
    stack: tuple[TensorInfo, ...] = ()
    scales: TensorInfo | None = None
    copies: tuple[TensorInfo, ...] = ()

    def read(self) -> torch.Tensor:
        """The weight in the file's dtype and our shape, contiguous; only its file's pages are touched.

        Raises CKPT-019 where a copy differs.
        """
        import torch

        if self.stack:
            first = take(stored_tensor(self.stack[0]), self.select, self.shape[1:])
            out = torch.empty(self.shape, dtype=first.dtype)
            out[0] = first
            for number, info in enumerate(self.stack[1:], 1):
                out[number] = take(stored_tensor(info), self.select, self.shape[1:])
            return out
        stored = stored_tensor(self.tensor)
        for copy in self.copies:
            other = stored_tensor(copy)
            if stored.shape != other.shape or not bool((stored == other).all()):
                raise SpecRTError(
                    "CKPT-019",
                    f"`{self.tensor.name}` and `{copy.name}` differ, but config.json says that they are one weight",
                    where=Where(str(copy.file)),
                    hint="if each is its own, set the flag to false there, mostly `tie_word_embeddings: false`",
                )
        if self.scales is not None:
            stored = decode_mxfp4(stored, stored_tensor(self.scales))
        return take(stored, self.select, self.shape)


def stored_tensor(info: TensorInfo) -> torch.Tensor:
    """A tensor as its file has it, or the numbers of a low-bit module."""
    if info.packed is not None:
        from specs.unpack import unpack

        return unpack(info.packed, stored_tensor)
    if info.joined:
        import torch

        pieces = [stored_tensor(piece) for piece in info.joined]
        bits = torch.cat([piece.view(torch.uint8) if piece.itemsize == 1 else piece for piece in pieces], info.axis)
        return bits.view(pieces[0].dtype)[: info.shape[0]]
    if not info.in_place:
        from safetensors import safe_open

        with safe_open(info.file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(info.stored or info.name)
            return tensor
    import numpy
    import torch

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    size = (info.end - info.begin,)
    mapped = numpy.memmap(info.file, numpy.uint8, "c", info.begin, size)  # copy on write: the file is never changed
    return torch.from_numpy(mapped).view(dtypes[info.dtype]).reshape(info.shape)


def take(stored: torch.Tensor, select: Select, shape: tuple[int, ...]) -> torch.Tensor:
    """Apply a selection to a stored tensor [rows, ...] (or [in, out] when transposed; leading axes count as rows)."""
    import torch

    if select.transpose and stored.ndim > 1:
        stored = stored.mT
    if not select.whole or select.copies > 1:
        stored = stored.reshape(select.outer, select.axis, select.inner, -1)[:, select.start : select.stop]
    if select.copies > 1:
        groups = stored.reshape(-1, select.copies, *stored.shape[1:])
        stored, bits = groups[:, 0], groups.view(torch.uint8) if groups.itemsize == 1 else groups
        if not bool((bits == bits[:, :1]).all()):
            message = f"{select.copies} ranks should hold the same rows of a key or value head, and do not"
            raise SpecRTError("CKPT-034", message, where=select.where, hint="convert the checkpoint for one rank")
    return stored.reshape(shape).contiguous()


def mxfp4_codes(blocks: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as codes [..., 32 G], values of E2M1 held in E4M3, and E8M0 scales [..., G]."""
    import torch

    from specs.unpack import e2m1

    codes = torch.stack((blocks & 15, blocks >> 4), -1).reshape(*blocks.shape[:-2], -1)
    return e2m1(codes), scales.view(torch.float8_e8m0fnu)


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """MXFP4 (OCP Microscaling Formats 1.0): u8 blocks [..., G, 16], two numbers a byte, the low half first, and u8
    scales [..., G], powers of two biased by 127 -> bfloat16 [..., 32 G]. Each product is exact in bfloat16.
    """
    import torch

    table = torch.tensor(E2M1, dtype=torch.bfloat16)
    out = torch.empty(*blocks.shape, 2, dtype=torch.bfloat16)
    for part, packed, powers in zip(out, blocks, scales, strict=True):  # one expert at a time: half the memory
        factors = torch.ldexp(torch.ones(powers.shape), powers.int() - 127).to(torch.bfloat16)[..., None]
        part[..., 0] = table[(packed & 15).int()] * factors
        part[..., 1] = table[(packed >> 4).int()] * factors
    return out.reshape(*blocks.shape[:-2], -1)
