"""Quantized models for a GPU: every program of a plan by its kernels, in Triton's interpreter, against the IR."""

from __future__ import annotations

import pytest
import torch

from compiler.ir.core import Graph, walk
from compiler.ir.verify import verify
from compiler.kernels.rows import MANY
from compiler.lower.expert_steps import why_not_kernels
from compiler.lower.low_bit import KernelSteps, low_bit_experts
from compiler.lower.tensorrt.cut import Cut, cut
from compiler.passes.pipelines import pipeline
from compiler.passes.quantization_plan import Override, QuantizationPlan
from compiler.passes.quantize import quantize
from compiler.passes.runner import run_passes
from compiler.quantization.weights import quantized_weights
from specs.precision import Recipe, load_recipe
from tests.golden_errors import ROOT, check_raises
from tests.kernels.cases import ROUNDING, rounding
from tests.kernels.execute import execute
from tests.tensorrt.driver import Values, interpreted, packed, run_plan, states_of
from tests.tensorrt.models import Tiny, tiny

SM90 = KernelSteps("tensorrt-8.6", 90)
# The norm of the difference over that of the result, for each program. Weights of codes are rounded to 16 bits by the
# IR and not by the kernels, 2^-11 of each; a value before rounding that is off by 2^-11 gets another code where it lies
# near a tie: one of 127 steps in about one of thirty of the largest, a step of 2^-4 in one of a hundred in E4M3. Both
# come to 0.006 of the norm; a program rounds up to four times. E2M1 has a step of a third: 0.003 of the values fall on
# the other side, 0.02 of the norm, and a hundredth of the scales of blocks do too.
WEIGHTS_ONLY, INPUTS_TOO, E2M1_INPUTS = 4e-3, 2.4e-2, 6e-2


class LowBit:
    """The weights of a quantized graph: rounded, with what calibration would give."""

    def __init__(self, model: Tiny, plan: QuantizationPlan) -> None:
        self.model = model
        self.rounded = quantized_weights(model.weights, plan.linears)

    def __call__(self, name: str) -> torch.Tensor:
        owner, _, part = name.rpartition(".")
        if part == "input_scale":
            return torch.tensor([0.03])
        if part == "input_outer":
            return torch.tensor([4.0 / 6 / 448])  # inputs are of size 1 to 4 here
        return torch.linspace(0.5, 2.0, self.model.weights(owner).shape[-1]) if part == "smooth" else self.rounded(name)


def pieces_of(
    name: str, recipe: str | Recipe, *overrides: Override, precision: str = "fp16", kernels: KernelSteps = SM90
) -> tuple[Cut, dict[str, torch.Tensor], Graph]:
    """A small model quantized for a GPU: its pieces, its stored tensors, its graph."""
    model = tiny(ROOT / "specs" / "models" / f"{name}.yaml", precision)
    plans: list[QuantizationPlan] = []
    asked = load_recipe(recipe) if isinstance(recipe, str) else recipe
    change = (quantize(asked, overrides, plans.append, experts=why_not_kernels),)
    graph, _ = run_passes(model.built.graph, pipeline(model.role, precision, "sm90", change))
    pieces = cut(graph, kernels=kernels)
    weights = LowBit(model, plans[-1])
    return pieces, {key: tensor.make(weights) for key, tensor in pieces.tensors.items()}, graph


def off(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.dtype == expected.dtype
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def check(
    pieces: Cut, weights: dict[str, torch.Tensor], bound: float, rows: int = 16, *, architecture: int = 90
) -> int:
    """Run a plan whose programs are kernels; gives how many there were."""
    seen = 0

    def program(graph: Graph, inputs: Values) -> dict[str, torch.Tensor]:
        nonlocal seen
        seen += 1
        got, expected = execute(graph, dict(inputs), rows, architecture), interpreted(graph, inputs)
        for port, value in expected.items():
            assert off(got[port], value) <= bound, port
        return got

    batch = packed(pieces.graph, [0, 0], [1, 4])
    run_plan(pieces, batch, weights, states_of(pieces.graph), interpreted, program)
    return seen


RECIPES = {
    "w8a16": WEIGHTS_ONLY, "w4a16": WEIGHTS_ONLY, "w4a16_asym": WEIGHTS_ONLY, "fp8": INPUTS_TOO,
    "fp8_rowwise": INPUTS_TOO, "w8a8": INPUTS_TOO, "w8a8_sq": INPUTS_TOO, "w8a8_block": INPUTS_TOO,
    "w4a8": INPUTS_TOO, "mxfp4": WEIGHTS_ONLY, "mxfp8": INPUTS_TOO, "nvfp4": E2M1_INPUTS,
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe(recipe: str) -> None:
    pieces, weights, _ = pieces_of("llama", recipe)
    assert [step.kind for step in pieces.steps] == ["program", *(["kernel", "program"] * 3)]
    assert check(pieces, weights, RECIPES[recipe]) == 4


@pytest.mark.parametrize(
    ("recipe", "rows"), [("w8a8", 64), ("w8a8", 1024), ("w8a8", MANY), ("w4a16", 1), ("w4a16", 64)]
)
def test_each_number_of_rows(recipe: str, rows: int) -> None:
    pieces, weights, _ = pieces_of("llama", recipe)
    assert check(pieces, weights, RECIPES[recipe], rows) == 4


@pytest.mark.parametrize("size", [32, 64])
def test_squares_of_a_weight(size: int) -> None:
    """As 128 x 128, in a size that a small model has: 64 divides no rows of 96, and takes none as inputs."""
    recipe = load_recipe("fp8_block")
    assert recipe.weights is not None
    assert recipe.activations is not None
    weights_of, inputs = (part.model_copy(update=new) for part, new in (
        (recipe.weights, {"group": (size,)}), (recipe.activations, {"block": size}),
    ))  # fmt: skip
    pieces, weights, graph = pieces_of(
        "llama", recipe.model_copy(update={"weights": weights_of, "activations": inputs})
    )
    joined = [eq for eq in walk(graph.equations) if eq.op == "dequantize" and eq.attr.get("block") == (1, size)]
    assert [eq.result.type.shape[0] for eq in joined if eq.values[0].type.dtype == "f8e4m3"]
    assert check(pieces, weights, INPUTS_TOO) == [step.kind for step in pieces.steps].count("program")


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8_sq_static"])
def test_inputs_whose_codes_a_chip_does_not_multiply(recipe: str) -> None:
    """They are rounded as the recipe says and widened again."""
    pieces, weights, _ = pieces_of("llama", recipe, kernels=KernelSteps("tensorrt-8.6", 70))
    programs = [step for step in pieces.steps if step.kind == "program"]
    assert check(pieces, weights, RECIPES.get(recipe, INPUTS_TOO), architecture=70) == len(programs) > 3


@pytest.mark.parametrize("name", ROUNDING)
def test_inputs_are_rounded_bit_for_bit(name: str) -> None:
    """Rows of every size that float16 has, of zeros, of ties, with a NaN: what is rounded is the definition's."""
    graph = rounding(name)
    verify(graph)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(24, 96, generator=generator) * torch.exp2(torch.arange(24)[:, None] - 14.0)
    x[0], x[1, 40:], x[2] = 0.0, 0.0, torch.arange(96) / 16 - 3
    x[3, 5] = torch.nan
    inputs = {"x": x.half(), "outer": torch.tensor([2.0**-10]), "least": torch.tensor([2.0**-19])}
    got, expected = execute(graph, inputs, 16)["y"], interpreted(graph, inputs)["y"]
    assert torch.equal(got.nan_to_num(1234.0), expected.nan_to_num(1234.0))


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


@pytest.mark.parametrize(("name", "recipe"), [("gpt_oss", "mxfp4"), ("mixtral", "w8a16")])
def test_experts_of_codes(name: str, recipe: str) -> None:
    """Recipes without rounded inputs take the matrices of experts, which lie as their kernel reads them."""
    pieces, weights, _ = pieces_of(name, recipe)
    coded = [low for one in pieces.segments.values() for _, low in low_bit_experts(one.graph.equations)]
    assert coded
    assert check(pieces, weights, WEIGHTS_ONLY) == [step.kind for step in pieces.steps].count("program")
    stored = {item.layout for item in pieces.tensors.values() if len(item.type.shape) == 3}
    assert stored == {"words", "columns"}


def test_experts_in_a_form_without_a_kernel_stay_as_they_are() -> None:
    """Groups of 16 columns: said by the plan, and an error where a plan says otherwise."""
    recipe = load_recipe("w4a16")
    assert recipe.weights is not None
    small = recipe.model_copy(
        update={"weights": recipe.weights.model_copy(update={"group": (16,), "otherwise": "keep"})}
    )
    model = tiny(ROOT / "specs" / "models" / "mixtral.yaml", "fp16")
    for experts in (why_not_kernels, None):
        plans: list[QuantizationPlan] = []
        change = (quantize(small, (Override(("attn.*",), None),), plans.append, experts=experts),)
        graph, _ = run_passes(model.built.graph, pipeline(model.role, "fp16", "sm90", change))
        if experts is None:
            check_raises("LOWER-039-experts", cut, graph, kernels=SM90)
        else:
            assert "a scale for 16 of" in plans[-1].kept["layers.0.moe.gate.weight"]
            assert not plans[-1].linears


def test_experts_are_programs_in_every_precision() -> None:
    model = tiny(ROOT / "specs" / "models" / "mixtral.yaml", "fp16")
    pieces = cut(model.graph, kernels=SM90)
    weights = {name: tensor.make(model.weights) for name, tensor in pieces.tensors.items()}
    assert any(eq.op == "gather_matmul" for one in pieces.segments.values() for eq in one.graph.equations)
    assert check(pieces, weights, WEIGHTS_ONLY) == [step.kind for step in pieces.steps].count("program")


def test_a_model_without_rotation_needs_no_engine() -> None:
    pieces, weights, _ = pieces_of("bloom", "fp8_rowwise")
    assert {step.kind for step in pieces.steps} == {"program", "kernel"}
    assert check(pieces, weights, INPUTS_TOO) == 4


def test_a_product_that_no_kernel_has() -> None:
    check_raises("LOWER-039", pieces_of, "llama", "w8a16", precision="fp32")
