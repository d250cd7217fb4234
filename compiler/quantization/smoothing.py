"""Factors between activations and weights: SmoothQuant (arXiv:2211.10438) and AWQ (arXiv:2306.00978).

x W' = (x m) (W / m)': m makes x easier to round (SmoothQuant), or weights that meet large x finer (AWQ). The strength
is searched; no smoothing is among what is tried, so that the result is never worse on the calibration data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compiler.passes.quantization_plan import Storage
from compiler.quantization.activations import rounded_inputs
from compiler.quantization.rounding import Scales, round_weight, search_range
from compiler.quantization.statistics import Inputs
from specs.precision import Recipe

Weighted = tuple[Tensor, Storage]


def smoothing(recipe: Recipe, inputs: Inputs, weights: Sequence[Weighted]) -> Tensor:
    """The factors m [K] that the input of these weights is multiplied by."""
    smooth = recipe.smooth
    assert smooth is not None
    if smooth.method == "awq":
        return _best(_awq_candidates(inputs, weights, smooth.steps), lambda m: _weight_cost(inputs, weights, m))
    return _best(_balanced(inputs, weights, smooth.steps), lambda m: _product_cost(recipe, inputs, weights, m))


def _best(candidates: Sequence[Tensor], cost: Callable[[Tensor], float]) -> Tensor:
    costs = [cost(candidate) for candidate in candidates]
    return candidates[costs.index(min(costs))]


def _normalized(scale: Tensor) -> Tensor:
    """Factors 1 / scale around 1: their largest and smallest are each other's inverse."""
    scale = scale.clamp_min(1e-4)
    return (scale.amax() * scale.amin()).sqrt() / scale


def _awq_candidates(inputs: Inputs, weights: Sequence[Weighted], steps: int) -> list[Tensor]:
    """mean|x|^a, and mean|x|^a / mean|w|^(1-a) as the published code has it, for a from 0 to 1."""
    size = inputs.mean.clamp_min(1e-8)
    relative = [weight.abs() / weight.abs().amax(-1, keepdim=True).clamp_min(1e-8) for weight, _ in weights]
    share = torch.cat([part.reshape(-1, part.shape[-1]) for part in relative]).mean(0).clamp_min(1e-8)
    found = [torch.ones_like(size)]
    for step in range(1, steps + 1):
        strength = step / steps
        found += [_normalized(size**strength), _normalized(size**strength / share ** (1 - strength))]
    return found


def _weight_cost(inputs: Inputs, weights: Sequence[Weighted], factors: Tensor) -> float:
    """Mean square error of the outputs when only weights are rounded: tr(D (x'x) D')."""
    total = 0.0
    for weight, storage in weights:
        error = round_weight(weight / factors, storage).dequantized() * factors - weight
        total += float(((error @ inputs.products) * error).sum())
    return total


def _balanced(inputs: Inputs, weights: Sequence[Weighted], steps: int) -> list[Tensor]:
    """max|x|^a / max|w|^(1-a) (eq. 4), for a from 0 to 1."""
    largest = torch.stack([weight.abs().reshape(-1, weight.shape[-1]).amax(0) for weight, _ in weights]).amax(0)
    x, w = inputs.largest.clamp_min(1e-5), largest.clamp_min(1e-5)
    found = [torch.ones_like(x)]
    for step in range(steps + 1):
        strength = step / steps
        found.append(_normalized(x**strength / w ** (1 - strength)))
    return found


def _product_cost(recipe: Recipe, inputs: Inputs, weights: Sequence[Weighted], factors: Tensor) -> float:
    """Mean square error of the outputs for the kept rows when both sides are rounded."""
    rows = rounded_inputs(recipe, inputs.smoothed(factors))
    total = 0.0
    for weight, storage in weights:
        exact = inputs.rows @ weight.mT
        found = rows @ round_weight(weight / factors, storage).dequantized().mT
        total += float((found - exact).square().sum())
    return total


def clipped(weight: Tensor, storage: Storage, inputs: Inputs) -> Scales:
    """Scales with the range of each group clipped where the outputs that it makes get the least error (section 3.2)."""
    width = storage.block[1] if storage.block else weight.shape[-1]
    count = weight.shape[-1] // width
    # the part of x'x that lies within a group: [groups, width, width]
    within = torch.stack(
        [inputs.products[i * width : (i + 1) * width, i * width : (i + 1) * width] for i in range(count)]
    )

    def cost(error: Tensor) -> Tensor:
        split = error.reshape(-1, count, width).transpose(0, 1)  # [groups, rows, width]
        return ((split @ within) * split).sum(-1).T.reshape(storage.scale_shape)

    return search_range(weight, storage, cost)
