"""How the bytes of a stored tensor lie: row-major, or as the kernel that reads it wants them.

`rows`     whole elements, row-major
`pairs`    half bytes row by row, the even element in the low half (TensorRT's INT4 and FP4, the interpreter's pack)
`words`    codes [outs, ins] as our kernels unpack them (compiler/kernels/products.py, `pack`)
`columns`  [outs, K] turned, a byte at least an element: scales and zeros of groups, which kernels read across outs

Of matrices of experts [experts, outs, ins] each lies so.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from compiler.ir.formats import HALF_BYTES, pack
from compiler.ir.types import DTYPES
from compiler.lower.stored_weights import Tensor

if TYPE_CHECKING:
    import torch

PAIRS, WORDS, COLUMNS = "pairs", "words", "columns"
_NAMES = {
    "f32": "F32", "f16": "F16", "bf16": "BF16", "f8e4m3": "F8_E4M3", "f8e8m0": "F8_E8M0", "i64": "I64", "i32": "I32",
    "i8": "I8", "u8": "U8", "bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class StoredType:
    """What a safetensors header says of a tensor, and its bytes; half bytes are U8, two to an element."""

    name: str
    shape: tuple[int, ...]
    bytes: int


def stored_type(tensor: Tensor) -> StoredType:
    """The type that a tensor's bytes have in its file."""
    shape, dtype, layout = tensor.type.static_shape(), tensor.type.dtype, tensor.layout
    if layout == COLUMNS:
        shape = (*shape[:-2], *shape[:-3:-1])
    if layout == WORDS:
        from compiler.kernels.products import packed_bytes

        shape = (*shape[:-1], packed_bytes(shape[-1], dtype))
    elif dtype not in HALF_BYTES:
        return StoredType(_NAMES[dtype], shape, prod(shape) * max(DTYPES[dtype], 8) // 8)
    elif layout == PAIRS:
        shape = (*shape[:-1], -(-shape[-1] // 2))
    return StoredType("I8" if layout == COLUMNS and dtype == "i4" else "U8", shape, prod(shape))


def bytes_of(value: torch.Tensor, tensor: Tensor) -> torch.Tensor:
    """The tensor as it lies in its file."""
    dtype, layout = tensor.type.dtype, tensor.layout
    if layout == COLUMNS:
        return value.mT
    if layout == WORDS:
        import torch

        from compiler.kernels import products

        if value.ndim > 2:  # matrices of experts, one by one: packing takes several times their memory
            return torch.stack([products.pack(one, dtype) for one in value])
        return products.pack(value, dtype)
    return pack(value, dtype) if dtype in HALF_BYTES else value
