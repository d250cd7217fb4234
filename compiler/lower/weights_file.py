"""Writes tensors as safetensors, one by one: no more than one is in memory, and files of a few gigabytes each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compiler.ir.types import DTYPES, TensorType
from compiler.lower.plan import StoredWeight
from compiler.lower.stored_weights import Tensor

if TYPE_CHECKING:
    import torch

SHARD = 4 << 30  # bytes
_ALIGN = 4096  # of the data behind the header: what a device reads in one go
_NAMES = {
    "f32": "F32", "f16": "F16", "bf16": "BF16", "f8e4m3": "F8_E4M3", "i64": "I64", "i32": "I32", "i8": "I8", "u8": "U8",
    "bool": "BOOL",
}  # fmt: skip


def write_weights(
    tensors: Sequence[Tensor],
    weights: Callable[[str], torch.Tensor],
    out: Path,
    progress: Callable[[str, int, int], None] | None = None,
    shard: int = SHARD,
) -> dict[str, StoredWeight]:
    """Write tensors in order into `weights-N-of-M.safetensors` of at most `shard` bytes, a larger tensor alone.

    Raises OSError where the disk is full.
    """
    groups = _groups(tensors, shard)
    stored: dict[str, StoredWeight] = {}
    done = 0
    for number, group in enumerate(groups, 1):
        name = f"weights-{number:05d}-of-{len(groups):05d}.safetensors"
        with open(out / name, "wb") as stream:
            stream.write(_header(group))
            for tensor in group:
                if progress is not None:
                    progress("weights", done, len(tensors))
                stream.write(_bytes(tensor.make(weights), tensor.type).data)
                stored[tensor.name] = StoredWeight(tensor.type, name)
                done += 1
    return stored


def byte_size(kind: TensorType) -> int:
    """Bytes of a stored tensor."""
    return prod(kind.static_shape()) * max(DTYPES[kind.dtype], 8) // 8


def _groups(tensors: Iterable[Tensor], shard: int) -> list[list[Tensor]]:
    groups: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        size = byte_size(tensor.type)
        if not groups or size > room:
            groups.append([])
            room = shard
        groups[-1].append(tensor)
        room -= size
    return groups


def _header(tensors: Sequence[Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        stop = start + byte_size(tensor.type)
        dtype, shape = _NAMES[tensor.type.dtype], list(tensor.type.static_shape())
        entries[tensor.name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: torch.Tensor, kind: TensorType) -> np.ndarray[Any, Any]:
    import torch

    if tuple(tensor.shape) != kind.static_shape():
        raise AssertionError(f"a tensor of shape {list(tensor.shape)} where {kind} is stored")
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
