"""Sizes of the named dims: of a batch, at most, and which optimization profile holds them."""

from __future__ import annotations

from collections.abc import Mapping

from runtime.executable import Array
from runtime.program import Program


def dims_of(program: Program, batch: Mapping[str, Array]) -> dict[str, int]:
    """The size of each named dim that an input of the batch has."""
    dims: dict[str, int] = {}
    for port in program.inputs:
        for dim, size in zip(port.shape, batch[port.name].shape, strict=True):
            if isinstance(dim, str):
                dims[dim] = size
    return dims


def most(program: Program, max_batch: int, max_sequence: int, tokens: int) -> dict[str, int]:
    """The largest size of each dim: that of the plan, or what fewer tokens in a call leave of it."""
    dims = {name: high for name, (_, _, high) in program.dims.items()}
    if program.cache is not None:
        dims["T"] = min(dims["T"], tokens)
        dims["B"] = min(dims["B"], max_batch)
        dims["B1"] = dims["B"] + 1
        dims["P"] = max_batch * -(-max_sequence // program.cache.block_size)
        if "N" in dims:
            dims["N"] = min(dims["N"], dims["T"])
    return dims


def engine_dims(program: Program) -> set[str]:
    """The dims that an engine's ports have; kernels take any size of the others."""
    names: set[str] = set()
    for step in program.steps:
        if step.kind == "engine":
            for value in (*step.inputs.values(), *step.outputs.values()):
                if value in program.types:
                    names.update(dim for dim in program.types[value].shape if isinstance(dim, str))
    return names


def profile_of(program: Program, dims: Mapping[str, int]) -> int:
    """The first profile whose ranges hold the sizes that engines see."""
    seen = engine_dims(program)
    for index, profile in enumerate(program.profiles):
        if all(low <= dims[name] <= high for name, (low, _, high) in profile.items() if name in seen):
            return index
    raise AssertionError(f"no profile holds { ({name: dims[name] for name in sorted(seen)}) }")
