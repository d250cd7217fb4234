"""Ranks of low-bit models: the same codes and scales, in parts; what is rounded on the way is rounded as one GPU does.

Tolerances are of the largest logit. Weights alone in low bits: float32's order of sums (test_split_tensors.py). Inputs
rounded by one scale: a sum in another order may take a number to the neighbouring code, a step of which is 1/127 of the
largest in int8, 2^-3 of the number in E4M3; half of that is granted for all together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch

from compiler.ir.core import Graph, walk
from compiler.ir.interpreter import run
from compiler.ir.ranks import run_ranks
from compiler.passes.pipelines import JOIN_PRODUCTS, pipeline
from compiler.passes.quantization_plan import Linear, QuantizationPlan, plan_quantization
from compiler.passes.quantize import quantize
from compiler.passes.runner import Pass, run_passes
from compiler.passes.split_tensors import split_tensors
from specs.precision import load_recipe
from tests.passes.graphs import ROPE, model, paged_states
from tests.passes.test_join_codes import LowBit
from tests.passes.test_split_tensors import STEPS, check_same, inputs_of

BUILT = model(attention=f"mask: causal, position: {ROPE}, bias: {{qkv: true, out: false}}", d_model=256, d_head=64,
              d_ffn=256)  # fmt: skip


def quantized(*change: Pass) -> tuple[Graph, list[Graph]]:
    """The whole graph, and those of two ranks."""
    whole, _ = run_passes(BUILT.graph, pipeline("decoder", "fp32", "sm90", change))
    ranks = [
        run_passes(BUILT.graph, pipeline("decoder", "fp32", "sm90", change, split=(split_tensors(2, rank),)))[0]
        for rank in range(2)
    ]
    return whole, ranks


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16", "w4a16_asym", "mxfp4"])
def test_weights(recipe: str) -> None:
    plans: list[QuantizationPlan] = []
    whole, ranks = quantized(quantize(load_recipe(recipe), (), plans.append))
    check_same(whole, ranks, cache(LowBit(BUILT.graph, plans[-1])))


@pytest.mark.parametrize(("recipe", "tolerance"), [("w8a8_sq_static", 1 / 254), ("fp8", 2**-4)])
def test_scales_of_inputs_from_calibration(recipe: str, tolerance: float) -> None:
    plans: list[QuantizationPlan] = []
    whole, ranks = quantized(quantize(load_recipe(recipe), (), plans.append))
    check_same(whole, ranks, cache(LowBit(BUILT.graph, plans[-1])), tolerance)


@pytest.mark.parametrize("recipe", ["w8a8", "fp8_rowwise"])
def test_scales_of_parts_of_rows_round_no_worse(recipe: str) -> None:
    """A part's largest number is no larger than the row's: beside what is not rounded, ranks are as near as one GPU.

    A tenth more is granted, for numbers that happen to be rounded away from it.
    """
    plans: list[QuantizationPlan] = []
    whole, ranks = quantized(quantize(load_recipe(recipe), (), plans.append))
    exact, _ = run_passes(BUILT.graph, pipeline("decoder", "fp32", "sm90"))
    weights, inputs = LowBit(BUILT.graph, plans[-1]), inputs_of(exact, STEPS[0])
    plain = run(exact, inputs, weights.tensors.__getitem__, paged_states(exact, 2))["logits"]
    rounded = cache(weights)
    one = run(whole, inputs, rounded, paged_states(whole, 2))["logits"]
    both = run_ranks(ranks, inputs, rounded, [paged_states(graph, 2) for graph in ranks])["logits"]
    assert 0 < float((both - plain).norm()) < 1.1 * float((one - plain).norm())


def test_codes_and_scales_of_a_part_are_those_of_the_whole() -> None:
    """Of a product over what is split, a rank has columns of the codes and of the scales, and nothing else of it."""
    change = quantize(load_recipe("w4a16"))
    passes = pipeline("decoder", "fp32", "sm90", (change,), split=(split_tensors(2, 1),))[: -len(JOIN_PRODUCTS) - 1]
    done, _ = run_passes(BUILT.graph, passes)
    made = {value.name: equation for equation in walk(done.equations) for value in equation.results}
    down = next(eq for eq in walk(done.equations) if eq.op == "matmul" and eq.result.name == "mlp.down")
    weight = made[down.values[1].name]
    assert weight.op == "dequantize"
    codes, scale = (made[value.name] for value in weight.values)
    assert (codes.op, codes.attr["start"], codes.attr["stop"]) == ("slice", 128, 256)
    assert (scale.op, scale.attr["start"], scale.attr["stop"]) == ("slice", 1, 2)
    assert [made[part.values[0].name].op for part in (codes, scale)] == ["weight", "weight"]


class Ordered(LowBit):
    """Codes whose columns are in another order than the inputs."""

    def __call__(self, name: str) -> torch.Tensor:
        owner, _, part = name.rpartition(".")
        if part != "order":
            return super().__call__(name)
        generator = torch.Generator().manual_seed(len(owner))
        return torch.randperm(self.tensors[owner].shape[-1], generator=generator).int()


def test_orders_of_columns_that_cross_ranks() -> None:
    recipe = load_recipe("w4a16")
    plan = plan_quantization(BUILT.graph, recipe)
    stored: dict[str, Linear | str] = {
        name: replace(linear, storage=replace(linear.storage, permuted=True)) for name, linear in plan.linears.items()
    }
    whole, ranks = quantized(quantize(recipe, (), None, stored))
    found = Counter(equation.op for equation in walk(ranks[0].equations))
    assert found["all_gather"] == 2 * 2 + 1  # before each product over what is split, and of the logits
    check_same(whole, ranks, cache(Ordered(BUILT.graph, plan)))
