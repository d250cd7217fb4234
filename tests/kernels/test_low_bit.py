"""Quantized models for a GPU: every program of a plan by its kernels, in Triton's interpreter, against the IR."""

from __future__ import annotations

import pytest
import torch

from compiler.ir.core import Graph
from compiler.kernels.rows import MANY
from compiler.lower.low_bit import KernelSteps
from compiler.lower.tensorrt.cut import Cut, cut
from compiler.passes.pipelines import pipeline
from compiler.passes.quantization_plan import Override, QuantizationPlan
from compiler.passes.quantize import quantize
from compiler.passes.runner import run_passes
from compiler.quantization.weights import quantized_weights
from specs.precision import load_recipe
from tests.golden_errors import ROOT, check_raises
from tests.kernels.execute import execute
from tests.tensorrt.driver import Values, interpreted, packed, run_plan, states_of
from tests.tensorrt.models import Tiny, tiny

SM90 = KernelSteps("tensorrt-8.6", 90)
# The norm of the difference over that of the result, for each program. Weights of codes are rounded to 16 bits by the
# IR and not by the kernels, 2^-11 of each; a value before rounding that is off by 2^-11 gets another code where it lies
# near a tie: one of 127 steps in about one of thirty of the largest, a step of 2^-4 in one of a hundred in E4M3. Both
# come to 0.006 of the norm; a program rounds up to four times.
WEIGHTS_ONLY, INPUTS_TOO = 4e-3, 2.4e-2


class LowBit:
    """The weights of a quantized graph: rounded, with what calibration would give."""

    def __init__(self, model: Tiny, plan: QuantizationPlan) -> None:
        self.model = model
        self.rounded = quantized_weights(model.weights, plan.linears)

    def __call__(self, name: str) -> torch.Tensor:
        owner, _, part = name.rpartition(".")
        if part == "input_scale":
            return torch.tensor([0.03])
        return torch.linspace(0.5, 2.0, self.model.weights(owner).shape[-1]) if part == "smooth" else self.rounded(name)


def pieces_of(
    name: str, recipe: str, *overrides: Override, precision: str = "fp16", kernels: KernelSteps = SM90
) -> tuple[Cut, dict[str, torch.Tensor], Graph]:
    """A small model quantized for a GPU: its pieces, its stored tensors, its graph."""
    model = tiny(ROOT / "specs" / "models" / f"{name}.yaml", precision)
    plans: list[QuantizationPlan] = []
    change = (quantize(load_recipe(recipe), overrides, plans.append),)
    graph, _ = run_passes(model.built.graph, pipeline(model.role, precision, "sm90", change))
    pieces = cut(graph, kernels=kernels)
    weights = LowBit(model, plans[-1])
    return pieces, {key: tensor.make(weights) for key, tensor in pieces.tensors.items()}, graph


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.dtype == expected.dtype
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def check(pieces: Cut, weights: dict[str, torch.Tensor], bound: float, rows: int = 16) -> int:
    """Run a plan whose programs are kernels; gives how many there were."""
    seen = 0

    def program(graph: Graph, inputs: Values) -> dict[str, torch.Tensor]:
        nonlocal seen
        seen += 1
        got, expected = execute(graph, dict(inputs), rows), interpreted(graph, inputs)
        for port, value in expected.items():
            assert off(got[port], value) <= bound, port
        return got

    batch = packed(pieces.graph, [0, 0], [1, 4])
    run_plan(pieces, batch, weights, states_of(pieces.graph), interpreted, program)
    return seen


RECIPES = {
    "w8a16": WEIGHTS_ONLY, "w4a16": WEIGHTS_ONLY, "w4a16_asym": WEIGHTS_ONLY, "fp8": INPUTS_TOO,
    "fp8_rowwise": INPUTS_TOO, "w8a8": INPUTS_TOO, "w8a8_sq": INPUTS_TOO, "w8a8_block": INPUTS_TOO,
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe(recipe: str) -> None:
    pieces, weights, _ = pieces_of("llama", recipe)
    assert [step.kind for step in pieces.steps] == ["engine", "program", *(["kernel", "program"] * 3)]
    assert check(pieces, weights, RECIPES[recipe]) == 4


@pytest.mark.parametrize(
    ("recipe", "rows"), [("w8a8", 64), ("w8a8", 1024), ("w8a8", MANY), ("w4a16", 1), ("w4a16", 64)]
)
def test_each_number_of_rows(recipe: str, rows: int) -> None:
    pieces, weights, _ = pieces_of("llama", recipe)
    assert check(pieces, weights, RECIPES[recipe], rows) == 4


def test_layers_that_are_quantized_unlike_each_other() -> None:
    mixed = Override(("attn.k",), None), Override(("mlp.up",), load_recipe("w8a16"))
    pieces, weights, _ = pieces_of("llama", "w4a16", *mixed)
    assert check(pieces, weights, WEIGHTS_ONLY) == [step.kind for step in pieces.steps].count("program")


@pytest.mark.parametrize(("name", "recipe"), [("mixtral", "w8a8"), ("deepseek_v2", "w4a16")])
def test_what_kernels_do_not_know_stays_an_engine(name: str, recipe: str) -> None:
    """Experts, a softmax of scores: each low-bit product is a program then, and what is between them an engine."""
    pieces, weights, _ = pieces_of(name, recipe)
    kinds = [step.kind for step in pieces.steps]
    assert kinds.count("engine") > 1
    assert check(pieces, weights, RECIPES[recipe]) == kinds.count("program")


def test_experts_are_programs_in_every_precision() -> None:
    model = tiny(ROOT / "specs" / "models" / "mixtral.yaml", "fp16")
    pieces = cut(model.graph, kernels=SM90)
    weights = {name: tensor.make(model.weights) for name, tensor in pieces.tensors.items()}
    assert check(pieces, weights, WEIGHTS_ONLY) == 3


def test_a_model_without_rotation_needs_no_engine() -> None:
    pieces, weights, _ = pieces_of("bloom", "fp8_rowwise")
    assert {step.kind for step in pieces.steps} == {"program", "kernel"}
    assert check(pieces, weights, INPUTS_TOO) == 4


def test_a_product_that_no_kernel_has() -> None:
    check_raises("LOWER-039", pieces_of, "llama", "w8a16", precision="fp32")
