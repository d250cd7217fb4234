"""Layers that quantize and dequantize, as NVIDIA's operators reference has them, by PyTorch.

Scales are constants of the build, but for those that IDynamicQuantizeLayer makes; quantization is symmetric, rounds to
nearest, ties to even, and saturates. docs.nvidia.com/deeplearning/tensorrt: operators Quantize, Dequantize and
DynamicQuantize, "Quantization Schemes". The formats are the IR's (compiler/ir/formats.py), which tests/ir holds to
their standards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from compiler.ir.formats import power_of_two_scale, round_to
from tests.tensorrt.recorder.semantics import TORCH, T, layer_of

if TYPE_CHECKING:
    from tests.tensorrt.recorder.network import Layer, Tensor

FORMATS = {"INT8": "i8", "FP8": "f8e4m3", "INT4": "i4", "FP4": "f4e2m1"}
FLOATS = ("FLOAT", "HALF", "BF16")
# Codes, elements that share a scale, types of the scale.
BLOCKS = {("INT4", 64): FLOATS, ("INT4", 128): FLOATS, ("FP4", 16): FLOATS, ("FP8", 32): ("E8M0",)}


def _is_constant(tensor: Tensor) -> bool:
    """Whether a tensor is known when the engine is built: a constant, or moved and cast from one."""
    source = tensor._source
    if source is None:
        return False
    if source._kind in ("add_cast", "add_shuffle", "add_identity"):
        return _is_constant(source._inputs[0])
    return bool(source._kind == "add_constant")


def _is_computed(tensor: Tensor) -> bool:
    """Whether a tensor has the scales that a dynamic quantization makes, or what they are dequantized to."""
    source = tensor._source
    if source is None:
        return False
    if source._kind == "add_dequantize":
        return _is_computed(source._inputs[0]) or _is_constant(source._inputs[0])
    return bool(source._kind == "add_dynamic_quantize" and source._outputs[1] is tensor)


def _check_scale(layer: Layer, codes: str, scale: Tensor) -> None:
    assert _is_constant(scale) or _is_computed(scale), f"{layer._kind}: a scale that is no constant of the build"
    old = layer._api.version.startswith("8.")
    assert codes in (("INT8",) if old else FORMATS), f"{layer._kind} of {codes} in {layer._api.version}"


def _quantize(layer: Layer, x: T, scale: T) -> T:
    wanted = layer._params.get("output_type")
    codes = "INT8" if wanted is None else wanted.name
    assert codes != "INT4" or _is_constant(layer._inputs[0]), "INT4 is for weights only"
    assert x[0] in FLOATS, f"quantize of {x[0]}"
    assert x[0] == scale[0], f"quantize of {x[0]} by {scale[0]}"
    assert not layer._api.version.startswith("8.") or x[0] == "FLOAT", f"8.6 quantizes FLOAT, not {x[0]}"
    _check_scale(layer, codes, layer._inputs[1])
    return codes, x[1]


def _dequantize(layer: Layer, codes: T, scale: T) -> T:
    _check_scale(layer, codes[0], layer._inputs[1])
    wanted = layer._params.get("output_type")
    assert wanted is not None or not layer._network._strong, "a strongly typed network asks for the output's type"
    made = "FLOAT" if wanted is None else wanted.name
    assert made in FLOATS, f"dequantize to {made}"
    assert scale[0] in ("E8M0", made), f"dequantize to {made} by a scale of {scale[0]}"
    return made, codes[1]


@layer_of("add_quantize", _quantize)
def quantize(layer: Layer, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    step = _steps(layer, x, scale, None)
    return round_to(x.float() / step, FORMATS[layer._output._kind])


@layer_of("add_dequantize", _dequantize)
def dequantize(layer: Layer, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    step = _steps(layer, codes, scale, layer._inputs[0]._kind)
    return (codes.float() * step).to(TORCH[layer._output._kind])


def _steps(layer: Layer, x: torch.Tensor, scale: torch.Tensor, codes: str | None) -> torch.Tensor:
    """The scale of each element: one for all, one for each place along the axis, or one for each block of it."""
    axis = layer._state["axis"]
    assert 0 <= axis < x.ndim, f"axis {axis} of rank {x.ndim}"
    wide = scale.float()
    assert bool((wide > 0).all()), "scales must be positive"
    if scale.numel() == 1:
        assert scale.ndim <= 1, f"one scale of shape {list(scale.shape)}"
        assert codes not in ("INT4", "FP4"), f"{codes} has a scale for each block"
        return wide.reshape(())
    if scale.ndim == 1:
        assert scale.shape[0] == x.shape[axis], f"{scale.shape[0]} scales for {x.shape[axis]} channels"
        assert codes not in ("INT4", "FP4"), f"{codes} has a scale for each block"
        return wide.reshape([-1 if place == axis else 1 for place in range(x.ndim)])
    assert scale.ndim == x.ndim, f"scales of {list(scale.shape)} for {list(x.shape)}"
    assert axis >= x.ndim - 2, f"blocks along axis {axis} of {list(x.shape)}"
    size = x.shape[axis] // scale.shape[axis]
    assert [*x.shape[:axis], x.shape[axis] // size, *x.shape[axis + 1 :]] == list(scale.shape), "blocks of one axis"
    assert codes is not None, "nothing quantizes by blocks that are given"
    assert layer._inputs[1]._kind in BLOCKS.get((codes, size), ()), f"{codes} in blocks of {size}"
    return wide.repeat_interleave(size, axis)


def _dynamic(layer: Layer, x: T, *_: T) -> list[T]:
    codes, scale = layer._params["output_type"].name, layer._params["scale_type"].name
    assert x[0] in FLOATS, f"dynamic quantization of {x[0]}"
    assert x[1] in (2, 3), f"dynamic quantization of {x}"
    assert (codes, scale) in (("FP4", "FP8"), ("FP8", "E8M0")), f"dynamic quantization to {codes} by {scale}"
    return [(codes, x[1]), (scale, x[1])]


@layer_of("add_dynamic_quantize", _dynamic)
def dynamic_quantize(layer: Layer, x: torch.Tensor, outer: torch.Tensor | None = None) -> Any:
    """NVFP4: scales of 16 are max|x| / 6, themselves E4M3 over the outer scale; MXFP8: OCP MX 6.3, blocks of 32."""
    size, axis = int(layer._params["block_size"]), int(layer._params["axis"])
    assert axis == x.ndim - 1, "the recorder has blocks along rows"
    assert x.shape[-1] % size == 0, f"{x.shape[-1]} in blocks of {size}"
    most = x.float().abs().unflatten(-1, (-1, size)).amax(-1)
    if layer._output._kind == "FP4":
        assert size == 16
        assert outer is not None
        assert outer.numel() == 1
        assert _is_constant(layer._inputs[1]), "the outer scale must be a constant of the build"
        # a block of zeros has the least scale: it is not to be divided by
        scale = round_to((most / 6.0).clamp_min(outer.float() * 2.0**-9) / outer.float(), "f8e4m3")
        steps = (scale.float() * outer.float()).repeat_interleave(size, -1)
        return round_to(x.float() / steps, "f4e2m1"), scale
    assert size == 32
    assert outer is None
    scale = power_of_two_scale(most, "f8e4m3")
    return round_to(x.float() / scale.float().repeat_interleave(size, -1), "f8e4m3"), scale
