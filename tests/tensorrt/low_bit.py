"""Quantized small models for engines: what a toolchain's file calls native, with weights rounded as the recipe says."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from compiler.ir.core import Graph, walk
from compiler.lower.tensorrt.capabilities import BLOCKS
from compiler.passes.pipelines import pipeline
from compiler.passes.quantization_plan import Linear, Override, QuantizationPlan
from compiler.passes.quantize import quantize
from compiler.passes.runner import run_passes
from compiler.precision import decide
from compiler.quantization.weights import quantized_weights
from specs.hardware import gpu_names, load_gpu, load_toolchain
from specs.precision import load_recipe, recipe_names
from tests.tensorrt.models import Tiny, tiny

# What calibration would find: inputs of products are of size 1 to 4 here.
INPUT_SCALE = {"i8": 4.0 / 127, "f8e4m3": 4.0 / 448}
INPUT_OUTER = 4.0 / 6 / 448


@dataclass(frozen=True)
class LowBit:
    """A small model quantized for engines: its graph, and its weights with scales and codes."""

    model: Tiny
    graph: Graph
    plan: QuantizationPlan
    kept: tuple[str, ...]  # linears that TensorRT has no layers for, left in the base precision

    def weights(self, name: str) -> torch.Tensor:
        """A weight by name: rounded, or what calibration would give."""
        owner, _, part = name.rpartition(".")
        recipe = self.plan.recipe
        if part == "input_scale" and recipe.activations is not None:
            return torch.tensor([INPUT_SCALE[recipe.activations.type]])
        if part == "input_outer":
            return torch.tensor([INPUT_OUTER])
        if part == "smooth":
            return torch.linspace(0.5, 2.0, self.model.weights(owner).shape[-1])
        return quantized_weights(self.model.weights, self.plan.linears)(name)

    @property
    def baked(self) -> bool:
        """Whether engines must hold their weights: the scales of blocks are constants."""
        return any(eq.op == "dequantize" and "block" in eq.attr for eq in walk(self.graph.equations))


@cache
def native(line: str) -> tuple[tuple[str, str], ...]:
    """The recipes whose products the engines of a toolchain compute on some GPU, with the base precisions there."""
    toolchain, found = load_toolchain(line), set[tuple[str, str]]()
    for name in recipe_names():
        for gpu in map(load_gpu, gpu_names()):
            decision = decide(load_recipe(name), toolchain, gpu)
            if decision.works and decision.how == "native" and decision.base is not None:
                found.add((name, decision.base))
    return tuple(sorted(found))


def low_bit(path: Path, recipe: str, base: str, *, one_engine: bool = False) -> LowBit:
    """A small model of a spec, quantized; linears whose blocks TensorRT has no layers for stay as they are.

    `one_engine`: with TensorRT's own attention and cache.
    """
    model = tiny(path, base, wide=True, native=one_engine)
    plans: list[QuantizationPlan] = []

    def run(*overrides: Override) -> Graph:
        change = quantize(
            load_recipe(recipe), overrides, plans.append, experts=lambda _: "engines multiply them as floats"
        )
        return run_passes(model.built.graph, pipeline(model.role, base, "sm90", (change,), native=one_engine))[0]

    graph = run()
    kept = tuple(name.removesuffix(".weight") for name, linear in plans[0].linears.items() if not _taken(linear))
    return LowBit(model, run(Override(kept, None)) if kept else graph, plans[-1], kept)


def _taken(linear: Linear) -> bool:
    """Whether there is a layer for a weight that is stored so."""
    storage = linear.storage
    if not storage.block:
        return storage.type in ("i8", "f8e4m3")
    several = any(size > 1 for size in storage.scale_shape)
    return several and (storage.type, storage.block[-1], storage.scale) in BLOCKS
