"""Several ranks of one model: the same steps and segments, and tensors that are the same for all, stored once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.lower.plan import Plan, Step, StoredWeight
from compiler.lower.stored_weights import Tensor
from compiler.lower.weights_file import write_weights

if TYPE_CHECKING:
    import torch


def plan_file(rank: int) -> str:
    """Where a bundle has the plan of a rank (runtime/bundle.py has the same)."""
    return f"plan-{rank}.json" if rank else "plan.json"


def check_alike(plans: Sequence[Plan]) -> None:
    """Raises AssertionError where ranks differ in more than numbers: engines and kernels are those of the first."""
    first, *others = plans
    for rank, other in enumerate(others, 1):
        for index, (one, two) in enumerate(zip(first.steps, other.steps, strict=True)):
            if _shared(one) != _shared(two):
                raise AssertionError(f"step {index} of rank {rank} is {two}, of rank 0 {one}")
        if (other.values, other.cache, other.dims) != (first.values, first.cache, first.dims):
            raise AssertionError(f"values or caches of rank {rank} are not those of rank 0")


def _shared(step: Step) -> Step:
    """Without the lists that each rank has a part of."""
    return replace(step, attrs={name: value for name, value in step.attrs.items() if name != "slopes"})


def write_ranks(
    each: Sequence[Sequence[Tensor]],
    weights: Callable[[str], torch.Tensor],
    out: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, StoredWeight]]:
    """Write the tensors of each rank, what it has of its own in files with its number; gives where each lies.

    Raises OSError where the disk is full.
    """
    known: dict[tuple[str, str], StoredWeight] = {}  # by name and how it is made
    found: list[dict[str, StoredWeight]] = []
    for rank, tensors in enumerate(each):
        new = [tensor for tensor in tensors if _key(tensor) not in known]
        prefix = f"weights-rank{rank}" if rank else "weights"
        stored = write_weights(new, weights, out, progress, prefix=prefix) if new else {}
        known |= {_key(tensor): stored[tensor.name] for tensor in new}
        found.append({tensor.name: known[_key(tensor)] for tensor in tensors})
    return found


def _key(tensor: Tensor) -> tuple[str, str]:
    return tensor.name, f"{tensor.type} {tensor.layout} {tensor.graph}"
