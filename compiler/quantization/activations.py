"""Ranges of activations: static scales from calibration, and rounding by a recipe as its graph will do it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compiler.ir.formats import RANGE
from compiler.ir.ops import REGISTRY
from compiler.passes.quantize import LEAST_E4M3
from compiler.quantization.rounding import SHRINK
from compiler.quantization.statistics import Inputs
from specs.precision import Recipe

PERCENTILE = 0.9999  # of |x| in the kept rows


def static_parts(recipe: Recipe, inputs: Inputs) -> dict[str, Tensor]:
    """The stored scales of a recipe's static activations, by the suffix that `quantize` names them with."""
    how = recipe.activations
    if how is None or how.mode != "static":
        return {}
    if how.scale == "f8e4m3":
        return {"input_outer": (inputs.largest.amax() / (RANGE[how.type][1] * RANGE["f8e4m3"][1])).reshape(1)}
    return {"input_scale": _static_scale(inputs, how.type, how.range).reshape(1)}


def _static_scale(inputs: Inputs, dtype: str, search: str) -> Tensor:
    top = RANGE[dtype][1]
    largest = inputs.largest.amax().clamp_min(1e-12)
    if search == "percentile":
        return inputs.rows.abs().flatten().quantile(PERCENTILE).clamp_min(1e-12) / top
    if search == "max":
        return largest / top
    costs = []
    for part in SHRINK:
        scale = largest * part / top
        rounded = _round(inputs.rows, scale.reshape(1), dtype, ())
        costs.append(float((rounded - inputs.rows).square().sum()))
    return largest * SHRINK[costs.index(min(costs))] / top


def _round(x: Tensor, scale: Tensor, dtype: str, block: tuple[int, ...], outer: Tensor | None = None) -> Tensor:
    codes = REGISTRY["quantize"].body(x, scale, None, outer, dtype=dtype, block=block)
    result: Tensor = REGISTRY["dequantize"].body(codes, scale, None, outer, dtype="f32", block=block)
    return result


def rounded(recipe: Recipe, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """Inputs x [N,K] as the graph of a recipe rounds them; `parts` are the static scales, where it has some."""
    how = recipe.activations
    if how is None:
        return x
    block = (1, how.block) if how.block is not None else ()
    if "input_scale" in parts:
        return _round(x, parts["input_scale"], how.type, ())
    row_scale, outer = REGISTRY["row_scale"].body, parts.get("input_outer")
    if outer is None:
        return _round(x, row_scale(x, dtype=how.type, scale=how.scale, block=how.block), how.type, block)
    exact = torch.maximum(row_scale(x, dtype=how.type, block=how.block), outer * LEAST_E4M3)
    scale = REGISTRY["quantize"].body(exact, outer, dtype="f8e4m3")
    return _round(x, scale, how.type, block, outer)


def rounded_inputs(recipe: Recipe, inputs: Inputs) -> Tensor:
    """The kept rows as the graph of a recipe rounds them."""
    return rounded(recipe, inputs.rows, static_parts(recipe, inputs))
