"""The CPU backend: OpenVINO, through its opset API, operation by operation. One graph is one segment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.ir.core import Equation, Graph, walk
from compiler.lower.openvino.capabilities import verdict
from compiler.lower.openvino.dynamic import dynamic_group

if TYPE_CHECKING:
    import torch

NAME = "openvino"
TARGET = "cpu"

# What compile_model is given. KV_CACHE_PRECISION is stated because a bf16 model gets a u8 cache otherwise.
# DYNAMIC_QUANTIZATION_GROUP_SIZE is added because activations of low-bit weights become int8 otherwise.
_COMMON = {"PERFORMANCE_HINT": "LATENCY"}
_CONFIG = {
    "fp32": {**_COMMON, "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"},
    "bf16": {**_COMMON, "INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"},
}
_CONFIG["fp16"] = _CONFIG["fp32"]  # stored, not computed in
# The plugin's own layout of keys, a scale for each channel of a block, would change with every token that joins it.
CODES_CONFIG = {"KV_CACHE_PRECISION": "u8", "KEY_CACHE_QUANT_MODE": "BY_TOKEN"}

__all__ = ["NAME", "TARGET", "config", "step_of", "toolchain", "verdict", "write_segment"]


def config(precision: str, graph: Graph | None = None) -> dict[str, str]:
    """What the runtime gives to compile_model for a base precision, fp32, bf16 or fp16, and a segment."""
    group = 0 if graph is None else dynamic_group(graph)
    found = {**_CONFIG[precision], "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group)}
    return found | CODES_CONFIG if graph is not None and _has_codes(graph) else found


def _has_codes(graph: Graph) -> bool:
    return any(equation.op == "paged_attention" and "codes" in equation.attr for equation in walk(graph.equations))


def step_of(equation: Equation) -> None:
    """The step between engines that an operation needs: none does, also attention with a paged cache."""
    del equation


def toolchain() -> dict[str, str]:
    """The versions that a bundle records, as the runtime compares them: `2026.4.1`."""
    from importlib.metadata import version

    return {"openvino": version("openvino")}


def write_segment(
    graph: Graph,
    weights: Callable[[str], torch.Tensor],
    path: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write a segment as `path` (xml) and its weights beside it (bin); OSError where the disk is full."""
    from compiler.lower.openvino.segment import write  # imports OpenVINO, which reading verdicts does not need

    write(graph, weights, path, progress)
