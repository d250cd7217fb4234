"""Checkpoints in one file for each rank (`rank0.safetensors`, ...): tensors of tensor parallelism joined, layers of
pipeline stages counted on. Nothing is read here: a joined tensor names its pieces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.errors import SpecRTError, Where

if TYPE_CHECKING:
    from specs.checkpoint import TensorInfo
    from specs.formats import Cut

_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
_WHOLE = ("activation_scaling_factor", "kv_cache_scaling_factor")


def read_ranks(folder: Path, config: Mapping[str, Any], cut: Cut) -> dict[str, TensorInfo]:
    """All tensors of a folder by name; raises CKPT-007 for missing ranks, CKPT-034 for a cut that is not undone."""
    mapping = config.get("mapping") or {}
    width, stages = int(mapping.get("tp_size") or 1), int(mapping.get("pp_size") or 1)
    where = Where(str(folder / "config.json"))
    world, kv_heads = int(mapping.get("world_size") or width * stages), config.get("num_key_value_heads")
    if world != width * stages:
        message = f"{world} ranks are not {width} of tensor times {stages} of pipeline parallelism"
        raise SpecRTError("CKPT-034", message, where=where, hint="convert the checkpoint for one rank")
    if isinstance(kv_heads, int) and kv_heads % width:
        message = f"{kv_heads} key and value heads over {width} ranks: some are stored more than once"
        raise SpecRTError("CKPT-034", message, where=where, hint="convert the checkpoint for one rank")
    tensors: dict[str, TensorInfo] = {}
    layers = 0
    for stage in range(stages):
        ranks = [_rank(folder, stage * width + rank, world) for rank in range(width)]
        for name in ranks[0]:
            pieces = [rank[name] for rank in ranks if name in rank]
            if len(pieces) != width:
                raise SpecRTError("CKPT-007", f"`{name}` is not in every rank", where=Where(str(folder)))
            full = _moved(name, layers)
            tensors[full] = _joined(full, pieces, _axis(name, pieces[0], config, cut))
        layers = 1 + max((int(match[0]) for name in tensors if (match := _LAYER.search(name))), default=-1)
    return tensors


def _moved(name: str, layers: int) -> str:
    """A layer's tensor by its number in the whole model."""
    return _LAYER.sub(lambda match: str(int(match[0]) + layers), name)


def _rank(folder: Path, rank: int, world: int) -> dict[str, TensorInfo]:
    from specs.checkpoint import read_header

    path = folder / f"rank{rank}.safetensors"
    if not path.is_file():
        raise SpecRTError(
            "CKPT-007",
            f"{path.name} is missing: config.json tells of {world} ranks",
            where=Where(str(folder)),
        )
    return read_header(path)


def _axis(name: str, piece: TensorInfo, config: Mapping[str, Any], cut: Cut) -> int | None:
    """The axis along which the ranks' pieces of a tensor lie; None where each rank has all of it."""
    module, _, part = name.rpartition(".")
    scalar = len(piece.shape) == 0 or piece.shape == (1,)
    if part in _WHOLE or scalar:
        return None
    if module.endswith(cut.embeddings):
        return int(config.get("embedding_sharding_dim") or 0) if config.get("use_parallel_embedding") else None
    if module.endswith(cut.outputs):
        return None if part == "prequant_scaling_factor" else 0
    if module.endswith(cut.inputs) and part != "bias":
        if part == "prequant_scaling_factor":
            return len(piece.shape) - 1
        return 1 if len(piece.shape) == 2 and piece.shape[1] > 1 else None
    return None


def _joined(name: str, pieces: list[TensorInfo], axis: int | None) -> TensorInfo:
    first = replace(pieces[0], name=name, stored=pieces[0].name)
    if axis is None or len(pieces) == 1:  # a bias behind a cut input is added once: the first rank has it
        return first
    shape = list(first.shape)
    shape[axis] = sum(piece.shape[axis] for piece in pieces)
    return replace(first, shape=tuple(shape), joined=tuple(pieces), axis=axis)
