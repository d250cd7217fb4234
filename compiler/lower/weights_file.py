"""Writes tensors as safetensors, one by one: no more than one is in memory, and files of a few gigabytes each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compiler.lower.layouts import bytes_of, stored_type
from compiler.lower.plan import StoredWeight
from compiler.lower.stored_weights import Tensor

if TYPE_CHECKING:
    import torch

SHARD = 4 << 30  # bytes
_ALIGN = 4096  # of the data behind the header: what a device reads in one go


def write_weights(
    tensors: Sequence[Tensor],
    weights: Callable[[str], torch.Tensor],
    out: Path,
    progress: Callable[[str, int, int], None] | None = None,
    shard: int = SHARD,
    prefix: str = "weights",
) -> dict[str, StoredWeight]:
    """Write tensors in order into `PREFIX-N-of-M.safetensors` of at most `shard` bytes, a larger tensor alone.

    Raises OSError where the disk is full.
    """
    groups = _groups(tensors, shard)
    stored: dict[str, StoredWeight] = {}
    done = 0
    for number, group in enumerate(groups, 1):
        name = f"{prefix}-{number:05d}-of-{len(groups):05d}.safetensors"
        with open(out / name, "wb") as stream:
            stream.write(_header(group))
            for tensor in group:
                if progress is not None:
                    progress("weights", done, len(tensors))
                stream.write(_bytes(tensor, weights).data)
                stored[tensor.name] = StoredWeight(tensor.type, name, stored_type(tensor).bytes, tensor.layout)
                done += 1
    return stored


def _groups(tensors: Iterable[Tensor], shard: int) -> list[list[Tensor]]:
    groups: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        size = stored_type(tensor).bytes
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
        stop = start + stored_type(tensor).bytes
        kind = stored_type(tensor)
        entries[tensor.name] = {"dtype": kind.name, "shape": list(kind.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor, weights: Callable[[str], torch.Tensor]) -> np.ndarray[Any, Any]:
    import torch

    made = tensor.make(weights)
    if tuple(made.shape) != tensor.type.static_shape():
        raise AssertionError(f"a tensor of shape {list(made.shape)} where {tensor.type} is stored")
    return bytes_of(made, tensor).contiguous().reshape(-1).view(torch.uint8).numpy()
