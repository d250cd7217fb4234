"""Gives a quantized graph its weights: codes and scales by name, made on demand or from calibration."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import TYPE_CHECKING

from compiler.passes.quantization_plan import Linear

if TYPE_CHECKING:
    import torch

    from compiler.quantization.rounding import Quantized

Weights = Callable[[str], "torch.Tensor"]
Make = Callable[[str], "Mapping[str, torch.Tensor]"]
PARTS = ("codes", "scale", "zero", "outer")


def quantized_weights(base: Weights, linears: Mapping[str, Linear], calibrated: Weights | None = None) -> Weights:
    """Weights by the names of a quantized graph; one float weight is held at a time.

    `calibrated` gives what calibration made, by the same names; it must then have every part of every linear.
    """
    rounded = by_part(base, linears, PARTS, lambda owner: _rounded(base(owner), linears[owner]).parts())

    def weight(name: str) -> torch.Tensor:
        owner, _, part = name.rpartition(".")
        if part in ("smooth", "input_scale", "input_outer") or (owner in linears and part in PARTS and calibrated):
            assert calibrated is not None  # the caller checks that a recipe which needs data has some
            return calibrated(name)
        return rounded(name)

    return weight


def by_part(base: Weights, owners: Container[str], parts: Container[str], make: Make) -> Weights:
    """`base`, and instead of an owner's weight its `parts` by `OWNER.PART`: made together, those of one are held."""
    last: tuple[str, Mapping[str, torch.Tensor]] | None = None

    def weight(name: str) -> torch.Tensor:
        nonlocal last
        owner, _, part = name.rpartition(".")
        if owner not in owners or part not in parts:
            return base(name)
        if last is None or last[0] != owner:
            last = (owner, make(owner))
        return last[1][part]

    return weight


def _rounded(weight: torch.Tensor, linear: Linear) -> Quantized:
    from compiler.quantization.rounding import round_weight

    how = linear.recipe.weights
    assert how is not None
    return round_weight(weight, linear.storage, how.range)
