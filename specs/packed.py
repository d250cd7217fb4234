"""Checkpoints whose linears are stored in low-bit formats: each becomes one tensor `MODULE.weight` [out, in].

`quant_method` of config.json's `quantization_config` (or hf_quant_config.json) selects the layout. Nothing is read
here: a weight is unpacked to float32 when it is asked for. Layouts, each from the code that writes it: AutoAWQ 0.2
`WQLinear_GEMM`, gptqmodel and its forerunners (format 1 stores zeros less one), compressed-tensors 0.9, block scales of
arXiv:2412.19437 (section 3.3), FP8 and NVFP4 of NVIDIA ModelOpt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from specs.errors import SpecRTError, Where
from specs.mixed_gemm import GPUS

if TYPE_CHECKING:
    from specs.checkpoint import TensorInfo

Infos = dict[str, "TensorInfo"]
# Parts of a quantized module beside its codes, by the last part of their names.
_PARTS = frozenset(
    {
        "qweight", "qzeros", "scales", "g_idx", "weight", "weight_packed", "weight_scale", "weight_scale_inv",
        "weight_scale_2", "weight_shape", "weight_zero_point", "weight_g_idx", "weights_scaling_factor",
        "prequant_scaling_factor", "per_channel_scale", "zero",
    }
)  # fmt: skip
# Ranges of activations and caches that were calibrated for a runtime which rounds them; weights do without.
_RANGES = frozenset(
    {
        "input_scale",
        "input_zero_point",
        "output_scale",
        "activation_scale",
        "input_global_scale",
        "k_scale",
        "v_scale",
        "activation_scaling_factor",
        "kv_cache_scaling_factor",
        "kv_cache_rcp_scaling_factor",
    }
)


@dataclass(frozen=True)
class Packed:
    """How the weight of one module is unpacked: the layout, its tensors by part, and numbers from the configuration."""

    layout: str
    parts: tuple[tuple[str, TensorInfo], ...]
    bits: int = 8
    zero_offset: int = 0
    block: tuple[int, ...] = ()  # outputs and inputs that share a scale, where that is stated
    group: int = 0  # inputs that share a scale, where that is stated
    symmetric: bool = False  # every zero point is the middle of the range
    permuted: bool = False  # inputs were put into groups by their size (act-order)
    gpu: int = 0  # the SM in whose order the bytes lie; `parts` of rank r then end in `.r`, in the order of `axis`
    axis: int = 0


@dataclass(frozen=True)
class _Method:
    marker: str  # the part that tells a quantized module
    packed: Packed  # without parts


def unpacked(config: dict[str, Any], further: Mapping[str, Any], tensors: Infos, where: Where) -> tuple[Any, Infos]:
    """The configuration without its `quantization_config`, and tensors with one weight for each quantized module.

    `further` is hf_quant_config.json, where there is one. Raises SpecRTError CKPT-030 for a method or variant that is
    not read, CKPT-031 for a module that lacks a part.
    """
    legacy = (config.get("quantization") or {}).get("quant_algo") if "architecture" in config else None
    if legacy is not None:
        return config, _merged(tensors, _legacy(config["quantization"], tensors, where), where)
    stated = config.get("quantization_config") or {}
    method = stated.get("quant_method") or ("modelopt" if further else None)
    if method is None or method == "mxfp4":  # mxfp4 is mapped by the specs of the models that have it
        return config, tensors
    chosen = _method(str(method), stated, further, where)
    rest = {key: value for key, value in config.items() if key != "quantization_config"}
    return rest, _merged(tensors, chosen, where)


def _method(method: str, stated: Mapping[str, Any], further: Mapping[str, Any], where: Where) -> _Method:
    def refuse(what: str, hint: str) -> SpecRTError:
        return SpecRTError("CKPT-030", f"this checkpoint's weights are quantized by {what}", where=where, hint=hint)

    if method == "awq":
        if stated.get("bits", stated.get("w_bit", 4)) != 4 or str(stated.get("version", "gemm")).lower() != "gemm":
            raise refuse(f"awq in its version `{stated.get('version')}`", "4 bits in version gemm are read")
        return _Method("qweight", Packed("awq", (), 4, group=_number(stated, "group_size", "q_group_size")))
    if method == "gptq":
        bits = stated.get("bits")
        if bits not in (2, 4, 8):
            raise refuse(f"gptq with {bits} bits", "2, 4 and 8 bits are read")
        moved = bool(stated.get("desc_act")) and not stated.get("static_groups")
        offset = 0 if stated.get("checkpoint_format") == "gptq_v2" else 1
        size, even = _number(stated, "group_size"), bool(stated.get("sym"))
        return _Method("qweight", Packed("gptq", (), int(bits), offset, group=size, symmetric=even, permuted=moved))
    if method == "compressed-tensors":
        return _compressed(stated, refuse)
    if method == "fp8":
        block = tuple(int(size) for size in stated.get("weight_block_size") or ())
        return _Method("weight_scale_inv" if block else "weight_scale", Packed("scaled", (), block=block))
    if method == "modelopt":
        algorithm = str({**stated, **further.get("quantization", {})}.get("quant_algo"))
        if algorithm in ("FP8", "NVFP4"):
            return _Method("weight_scale", Packed("scaled" if algorithm == "FP8" else "nvfp4", ()))
        raise refuse(f"modelopt's `{algorithm}`", "FP8 and NVFP4 are read")
    if method == "bitsandbytes":
        hint = (
            "its blocks can't be read without its library: take the checkpoint that it was made from, with a precision"
        )
        raise refuse("bitsandbytes", f"{hint} as w8a16 or w4a16_awq")
    known = "awq, gptq, compressed-tensors, fp8, modelopt"
    raise refuse(f"`{method}`", f"read are {known}; or take the checkpoint that it was made from")


def _legacy(stated: Mapping[str, Any], tensors: Infos, where: Where) -> _Method:
    """The `quantization` of a checkpoint in one file for each rank."""
    algorithm = str(stated["quant_algo"])
    if algorithm == "FP8":
        return _Method("weights_scaling_factor", Packed("scaled", ()))
    if algorithm in ("W4A16_AWQ", "W4A8_AWQ"):
        return _Method("weights_scaling_factor", Packed("halves", (), 4))
    named = f"this checkpoint's weights are quantized by `{algorithm}`"
    if algorithm not in ("W8A16", "W4A16", "W8A16_GPTQ", "W4A16_GPTQ"):
        hint = "FP8, W4A16_AWQ, W4A8_AWQ, W8A16, W4A16 and their GPTQ are read; or take what it was made from"
        raise SpecRTError("CKPT-030", named, where=where, hint=hint)
    marker = "weights_scaling_factor" if algorithm.endswith("_GPTQ") else "per_channel_scale"
    if not any(name.endswith(f".{marker}") for name in tensors):
        return _Method(marker, Packed("mixed", ()))  # numbers, which are rounded when an engine is built
    told = re.fullmatch(r"sm(\d+)", str(stated.get("made_for", "")))
    if told is None or int(told[1]) not in GPUS:
        message = f"{named}, in the order of the GPU that converted it" + (f", {told[0]}" if told else "")
        hint = "SM70 to SM89 are read" if told else 'say which, say `"made_for": "sm80"` beside `quant_algo`'
        raise SpecRTError(
            "CKPT-030", message, where=where, hint=f"{hint}; or take the checkpoint that it was made from"
        )
    return _Method(marker, Packed("mixed", (), int(algorithm[1]), gpu=int(told[1])))


def _number(stated: Mapping[str, Any], *names: str) -> int:
    return next((int(stated[name]) for name in names if isinstance(stated.get(name), int)), 0)


def _compressed(stated: Mapping[str, Any], refuse: Any) -> _Method:
    form = stated.get("format")
    bits = {
        int(group["weights"]["num_bits"]) for group in stated.get("config_groups", {}).values() if group.get("weights")
    }
    if form in ("int-quantized", "float-quantized", "naive-quantized") and bits <= {8}:
        return _Method("weight_scale", Packed("scaled", ()))
    if form == "pack-quantized" and len(bits) == 1 and bits <= {4, 8}:
        return _Method("weight_packed", Packed("packed", (), bits.pop()))
    hint = "int-quantized, float-quantized and pack-quantized with 4 or 8 bits are read"
    raise refuse(f"compressed-tensors in its format `{form}`, {', '.join(map(str, sorted(bits)))} bits", hint)


def _merged(tensors: Infos, method: _Method, where: Where) -> Infos:
    """Tensors with each quantized module's parts replaced by its weight."""
    modules = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] == method.marker}
    found: Infos = {}
    parts: dict[str, dict[str, TensorInfo]] = {module: {} for module in sorted(modules)}
    for name, info in tensors.items():
        module, _, part = name.rpartition(".")
        if part in _RANGES:
            continue
        if module in modules and part in _PARTS:
            parts[module][part] = info
        else:
            found[name] = info
    for module, own in parts.items():
        found[f"{module}.weight"] = _weight(module, own, method, where)
    return found


_NEEDED = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales"),
    "scaled": ("weight",),
    "packed": ("weight_packed", "weight_scale", "weight_shape"),
    "nvfp4": ("weight", "weight_scale", "weight_scale_2"),
    "halves": ("weight", "weights_scaling_factor"),
    "mixed": ("weight",),
}


def _weight(module: str, parts: Mapping[str, TensorInfo], method: _Method, where: Where) -> TensorInfo:
    layout = method.packed.layout
    lacking = [part for part in _NEEDED[layout] if part not in parts]
    if lacking:
        raise SpecRTError("CKPT-031", f"the quantized module `{module}` lacks `{module}.{lacking[0]}`", where=where)
    count = 32 // method.packed.bits
    first = parts[_NEEDED[layout][0]]
    if len(first.shape) != 2:
        message = f"`{first.name}` holds the low-bit matrices of all experts in one tensor {list(first.shape)}"
        raise SpecRTError(
            "CKPT-030", message, where=where, hint="take the checkpoint that it was made from, with a precision"
        )
    rows, columns = first.shape
    shape = {
        "awq": (columns * count, rows),
        "gptq": (columns, rows * count),
        "scaled": (rows, columns),
        "packed": (rows, columns * count),
        "nvfp4": (rows, columns * 2),
        "halves": (rows * 2, columns),
        "mixed": (0, 0),
    }[layout]
    packed = replace(method.packed, parts=tuple(sorted(parts.items())))
    if layout == "mixed":
        packed, shape = _of_ranks(packed)
    return replace(first, name=f"{module}.weight", dtype="F32", shape=shape, packed=packed)


def _of_ranks(packed: Packed) -> tuple[Packed, tuple[int, int]]:
    """The same with each rank's own parts, and the whole shape: bytes are joined after their order is undone."""
    whole = dict(packed.parts)["weight"]
    pieces = {part: info.joined or (info,) for part, info in packed.parts}
    first, count = pieces["weight"][0], len(pieces["weight"])
    rows = first.shape[0]
    outputs = (first.end - first.begin) * 8 // packed.bits // rows
    parts = tuple((f"{part}.{rank}", info) for part, infos in pieces.items() for rank, info in enumerate(infos))
    shape = (outputs, rows * count) if whole.axis == 1 else (outputs * count, rows)
    return replace(packed, parts=parts, axis=whole.axis), shape
