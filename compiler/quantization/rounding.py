"""A float weight -> codes and scales, as a recipe stores them; every later algorithm rounds by these functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.ir.formats import LARGEST_EXPONENT, RANGE, power_of_two_scale
from compiler.ir.interpreter import torch_dtype
from compiler.ir.ops import REGISTRY
from compiler.passes.quantization_plan import Storage

SHRINK = tuple(1.0 - 0.025 * step for step in range(21))  # parts of the largest magnitude that a range may end at
_LEAST = {"f32": 1e-12, "f16": 2.0**-24, "f8e4m3": 2.0**-9}


@dataclass(frozen=True)
class Quantized:
    """Codes with what turns them back into numbers, held as the interpreter holds them."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    outer: Tensor | None
    block: tuple[int, ...]

    def dequantized(self) -> Tensor:
        """The float32 weight that these codes stand for."""
        body = REGISTRY["dequantize"].body
        result: Tensor = body(self.codes, self.scale, self.zero, self.outer, dtype="f32", block=self.block)
        return result

    def of_one(self, number: int) -> Quantized:
        """One weight of several."""
        zero = None if self.zero is None else self.zero[number]
        return Quantized(self.codes[number], self.scale[number], zero, self.outer, self.block)

    def parts(self) -> dict[str, Tensor]:
        """The stored tensors by the suffix that `quantize` names them with."""
        found = {"codes": self.codes, "scale": self.scale, "zero": self.zero, "outer": self.outer}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


@dataclass(frozen=True)
class Scales:
    """Everything but the codes."""

    scale: Tensor
    zero: Tensor | None
    outer: Tensor | None

    def codes(self, weight: Tensor, storage: Storage) -> Quantized:
        """The weight rounded with these scales."""
        body = REGISTRY["quantize"].body
        codes = body(weight, self.scale, self.zero, self.outer, dtype=storage.type, block=storage.block)
        return Quantized(codes, self.scale, self.zero, self.outer, storage.block)


def round_weight(weight: Tensor, storage: Storage, search: str = "max") -> Quantized:
    """Round to nearest; `search`: `max` ranges hold every weight, `mse` ranges have the least square error."""
    weight = weight.float()
    scales = weight_scales(weight, storage)
    if search == "mse":
        scales = search_range(weight, storage, lambda error: reduced(error.square(), storage, "sum"))
    return scales.codes(weight, storage)


def weight_scales(weight: Tensor, storage: Storage, shrink: Tensor | float = 1.0) -> Scales:
    """Scales (and zeros) whose range holds every weight of a block, or the part `shrink` (a number a block) of that."""
    low, high = RANGE[storage.type]
    outer: Tensor | None = None
    zero: Tensor | None = None
    if storage.zero:
        least = reduced(weight, storage, "amin").clamp_max(0.0) * shrink
        most = reduced(weight, storage, "amax").clamp_min(0.0) * shrink
        scale = _held((most - least) / (high - low), storage.scale)
        zero = (-least / scale.float()).round().clamp(low, high).to(torch_dtype(storage.type))
        return Scales(scale, zero, None)
    largest = reduced(weight.abs(), storage, "amax") * shrink
    if storage.scale == "f8e8m0":
        assert storage.type in LARGEST_EXPONENT  # the type rule of row_scale says the same of activations
        return Scales(power_of_two_scale(largest, storage.type), None, None)
    exact = largest / high
    if storage.outer:
        outer = (exact.amax() / RANGE["f8e4m3"][1]).clamp_min(1e-20).reshape(1)
        exact = exact / outer
    return Scales(_held(exact, storage.scale), None, outer)


def _held(scale: Tensor, dtype: str) -> Tensor:
    if dtype == "f8e4m3":
        scale = scale.clamp_max(RANGE[dtype][1])
    return scale.clamp_min(_LEAST[dtype]).to(torch_dtype(dtype))


def search_range(weight: Tensor, storage: Storage, cost: Callable[[Tensor], Tensor]) -> Scales:
    """The scales with the least cost for each block; `cost` of an error [..., out, in] has a number for each."""
    best: Tensor | None = None
    shrink = torch.ones(storage.scale_shape)
    for part in SHRINK:
        trial = weight_scales(weight, storage, part).codes(weight, storage).dequantized()
        found = cost(trial - weight)
        best = found if best is None else best
        shrink = torch.where(found < best, torch.full_like(shrink, part), shrink)
        best = torch.minimum(found, best)
    return weight_scales(weight, storage, shrink)


def reduced(weight: Tensor, storage: Storage, how: str) -> Tensor:
    """A reduction (amax, amin, sum) over what shares a scale: [..., out, in] -> the scale's shape."""
    shape = weight.shape
    if not storage.block:  # a row, or all of the last two dims
        return getattr(weight, how)((-1,) if storage.scale_shape[-2] == shape[-2] else (-2, -1), keepdim=True)  # type: ignore[no-any-return]
    rows, width = storage.block
    lead, (out, inputs) = shape[:-2], shape[-2:]
    short = -out % rows
    if short:
        weight = torch.nn.functional.pad(weight, (0, 0, 0, short))
    split = weight.reshape(*lead, (out + short) // rows, rows, inputs // width, width)
    return getattr(split, how)((-3, -1))  # type: ignore[no-any-return]
