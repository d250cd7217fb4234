"""Joined products of quantized weights: codes below codes, the same numbers; unlike neighbours stay apart."""

from __future__ import annotations

import pytest
import torch

from compiler.ir.core import Graph, walk
from compiler.passes.pipelines import pipeline
from compiler.passes.quantization_plan import Override, QuantizationPlan
from compiler.passes.quantize import quantize
from compiler.passes.runner import Pass, PassReport, run_passes
from compiler.quantization.weights import quantized_weights
from specs.precision import load_recipe
from tests.passes.graphs import ROPE, Paged, Weights, model

BIASED = f"mask: causal, position: {ROPE}, bias: {{qkv: true, out: false}}"
TOKENS = {0: [3, 1, 4, 1, 5], 1: [9, 2]}


def both(recipe: str, *overrides: Override, target: str = "sm90") -> tuple[Graph, Graph, QuantizationPlan, PassReport]:
    """A model quantized for a GPU, without and with joined products, its plan, and what `join_codes` did."""
    built = model(attention=BIASED, d_model=96).graph
    plans: list[QuantizationPlan] = []
    change: tuple[Pass, ...] = (quantize(load_recipe(recipe), overrides, plans.append),)
    apart, _ = run_passes(built, pipeline("decoder", "fp32", target, change)[:-3])
    joined, reports = run_passes(built, pipeline("decoder", "fp32", target, change))
    return apart, joined, plans[-1], reports[-1]


def products(graph: Graph) -> int:
    return sum(equation.op == "matmul" for equation in walk(graph.equations))


class LowBit(Weights):
    """Rounded weights, with what calibration would give: factors for `smooth`, scales for inputs."""

    def __init__(self, float_graph: Graph, plan: QuantizationPlan) -> None:
        super().__init__(float_graph)
        self.rounded = quantized_weights(self.tensors.__getitem__, plan.linears)

    def __call__(self, name: str) -> torch.Tensor:
        owner, _, part = name.rpartition(".")
        if part == "input_scale":
            return torch.tensor([0.05])
        return torch.linspace(0.5, 2.0, self.tensors[owner].shape[-1]) if part == "smooth" else self.rounded(name)


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16", "w4a16_asym", "fp8", "fp8_rowwise", "w8a8_sq", "w8a8_sq_tensor"])
def test_joined_codes_mean_the_same(recipe: str) -> None:
    apart, joined, plan, report = both(recipe)
    assert products(apart) == 2 * 7 + 1  # of the rounds left in `repeat`, of the peeled layer, and the head
    assert products(joined) == 2 * 4 + 1
    assert len(report.hits) == 4
    # no dequantized weight is an operand of a concatenation
    made = {value.name: equation.op for equation in walk(joined.equations) for value in equation.results}
    for equation in walk(joined.equations):
        assert equation.op != "concat" or all(made[value.name] != "dequantize" for value in equation.values)
    weights = LowBit(model(attention=BIASED, d_model=96).graph, plan)
    expected, got = Paged(apart, weights).step(TOKENS), Paged(joined, weights).step(TOKENS)
    for key, logits in expected.items():
        # one product in place of three: float32 sums in another order, and a rounding of inputs at a tie
        torch.testing.assert_close(got[key], logits, rtol=1e-4, atol=1e-4)


def test_unlike_neighbours_stay_apart() -> None:
    _, joined, _, report = both("w4a16", Override(("attn.k",), None), Override(("mlp.up",), load_recipe("w8a16")))
    assert products(joined) == 2 * 7 + 1
    assert not report.hits


def test_why_unlike_neighbours_stay_apart_is_told() -> None:
    change = (quantize(load_recipe("w4a16"), [Override(("attn.k",), None)]),)
    _, reports = run_passes(model(attention=BIASED, d_model=96).graph, pipeline("decoder", "fp32", "sm90", change))
    told = [refusal.reason for report in reports if report.name == "fuse_qkv" for refusal in report.refusals]
    assert "attn.k.weight as it is" in told[0]
    assert "in i4, scales of f16 for (1, 32)" in told[0]
