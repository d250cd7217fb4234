"""Checkpoints in one file for each rank (`rank0.safetensors`, ...): tensors of tensor and expert parallelism joined,
layers of pipeline stages counted on; ranks of context parallelism share files. Nothing is read here: a joined tensor
names its pieces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.errors import SpecRTError, Where

if TYPE_CHECKING:
    from specs.checkpoint import TensorInfo
    from specs.formats import Cut

_LAYER = re.compile(r"(?<=\blayers\.)\d+(?=\.)")
_WHOLE = ("activation_scaling_factor", "kv_cache_scaling_factor")


@dataclass(frozen=True)
class _Mapping:
    """How many ranks there are of each kind; `experts` of `width` hold different experts, the others parts of each."""

    width: int
    stages: int
    context: int
    experts: int


def read_ranks(folder: Path, config: Mapping[str, Any], cut: Cut) -> dict[str, TensorInfo]:
    """All tensors of a folder by name; raises CKPT-007 for missing ranks, CKPT-034 for a cut that is not undone."""
    mapping = _mapping(config, Where(str(folder / "config.json")))
    files = mapping.width * mapping.stages
    tensors: dict[str, TensorInfo] = {}
    layers = 0
    for stage in range(mapping.stages):
        ranks = [_rank(folder, stage * mapping.width + rank, files) for rank in range(mapping.width)]
        for name in ranks[0]:
            pieces = [rank[name] for rank in ranks if name in rank]
            if len(pieces) != mapping.width:
                raise SpecRTError("CKPT-007", f"`{name}` is not in every rank", where=Where(str(folder)))
            full = _moved(name, layers)
            if len(pieces[0].shape) == 3:
                tensors[full] = _of_experts(full, pieces, mapping.experts, cut)
            else:
                joined = _joined(full, pieces, _axis(name, pieces[0], config, cut))
                tensors[full] = _unpadded(joined, config, cut)
        layers = 1 + max((int(match[0]) for name in tensors if (match := _LAYER.search(name))), default=-1)
    return tensors


def _mapping(config: Mapping[str, Any], where: Where) -> _Mapping:
    told = config.get("mapping") or {}

    def size(key: str) -> int:
        return max(1, int(told.get(key) or 1))  # -1 of what there is none

    found = _Mapping(size("tp_size"), size("pp_size"), size("cp_size"), size("moe_ep_size"))
    ranks = found.width * found.stages * found.context
    world, kv_heads, message = int(told.get("world_size") or ranks), config.get("num_key_value_heads"), None
    if world != ranks:
        kinds = f"{found.width} of tensor times {found.stages} of pipeline times {found.context} of context parallelism"
        message = f"{world} ranks are not {kinds}"
    elif found.width % found.experts:
        message = f"{found.width} ranks of tensor parallelism are no multiple of {found.experts} of expert parallelism"
    elif isinstance(kv_heads, int) and kv_heads % found.width and found.width % kv_heads:
        message = f"{kv_heads} key and value heads do not divide among {found.width} ranks, nor these among them"
    if message is not None:
        raise SpecRTError("CKPT-034", message, where=where, hint="convert the checkpoint for one rank")
    return found


def _moved(name: str, layers: int) -> str:
    """A layer's tensor by its number in the whole model."""
    return _LAYER.sub(lambda match: str(int(match[0]) + layers), name)


def _rank(folder: Path, rank: int, files: int) -> dict[str, TensorInfo]:
    from specs.checkpoint import read_header

    path = folder / f"rank{rank}.safetensors"
    if not path.is_file():
        raise SpecRTError(
            "CKPT-007",
            f"{path.name} is missing: config.json tells of {files} such files",
            where=Where(str(folder)),
        )
    return read_header(path)


def _axis(name: str, piece: TensorInfo, config: Mapping[str, Any], cut: Cut) -> int | None:
    """The axis along which the ranks' pieces of a tensor lie; None where each rank has all of it."""
    module, _, part = name.rpartition(".")
    scalar = len(piece.shape) == 0 or piece.shape == (1,)
    if part in _WHOLE or scalar:
        return None
    if part == "per_channel_scale":  # each rank rounded its part with scales of its own
        return 0 if module.endswith((*cut.outputs, *cut.inputs)) else None
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
    first = replace(pieces[0], name=name, stored=pieces[0].stored or pieces[0].name)
    if axis is None or len(pieces) == 1:  # a bias behind a cut input is added once: the first rank has it
        return first
    shape = list(first.shape)
    shape[axis] = sum(piece.shape[axis] for piece in pieces)
    return replace(first, shape=tuple(shape), joined=tuple(pieces), axis=axis)


def _of_experts(name: str, pieces: list[TensorInfo], experts: int, cut: Cut) -> TensorInfo:
    """Matrices [experts, out, in] of all ranks: rank t has experts t % `experts`, and of these part t // `experts`."""
    module = name.rpartition(".")[0]
    axis = 1 if module.endswith(cut.outputs) else 2 if module.endswith(cut.inputs) else None
    return _joined(name, [_joined(name, pieces[first::experts], axis) for first in range(experts)], 0)


def _unpadded(tensor: TensorInfo, config: Mapping[str, Any], cut: Cut) -> TensorInfo:
    """A vocabulary's rows without those that make them a multiple of the ranks."""
    vocab, module = config.get("vocab_size"), tensor.name.rpartition(".")[0]
    if not tensor.joined or not isinstance(vocab, int) or not module.endswith(cut.vocabulary):
        return tensor
    padding = -vocab % len(tensor.joined)
    return replace(tensor, shape=(vocab, *tensor.shape[1:])) if tensor.shape[0] == vocab + padding else tensor
