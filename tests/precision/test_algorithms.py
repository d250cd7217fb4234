"""Rounding, ranges, smoothing and compensation: each does what it is for, on layers with known trouble."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compiler.ir.formats import RANGE
from compiler.passes.quantization_plan import Linear, Storage, storage_of
from compiler.quantization import second_order, shared_input
from compiler.quantization.activations import rounded_inputs, static_parts
from compiler.quantization.rounding import Quantized, round_weight
from compiler.quantization.second_order import round_second_order
from compiler.quantization.shared_input import quantized
from compiler.quantization.smoothing import clipped, smoothing
from compiler.quantization.statistics import Inputs, gather
from specs.precision import load_recipe, recipe_names
from tests.golden_errors import check_raises

OUT, WIDTH = 48, 128
GPTQ = load_recipe("w4a16_gptq")


def layer(outliers: float = 1.0, channels: int = 4) -> tuple[torch.Tensor, Inputs]:
    """A weight and correlated inputs of which some channels are `outliers` times as large."""
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    x = torch.randn(600, WIDTH, generator=generator) @ mix
    x[:, :channels] *= outliers
    return torch.randn(OUT, WIDTH, generator=generator), gather([x[:300], x[300:]])


def stored(recipe: str) -> Storage:
    found = storage_of(load_recipe(recipe), (OUT, WIDTH))
    assert isinstance(found, Storage)
    return found


def output_error(found: torch.Tensor, weight: torch.Tensor, inputs: Inputs) -> float:
    error = found - weight
    return float(((error @ inputs.products) * error).sum())


WEIGHTED = [name for name in recipe_names() if load_recipe(name).weights is not None]


@pytest.mark.parametrize("name", WEIGHTED)
def test_rounding_is_within_half_a_step(name: str) -> None:
    weight, _ = layer()
    storage = stored(name)
    found = round_weight(weight, storage)
    assert tuple(found.scale.shape) == storage.scale_shape
    low, high = RANGE[storage.type]
    assert float(found.codes.float().min()) >= low
    assert float(found.codes.float().max()) <= high
    largest = weight.abs().amax()
    # half of the widest step: of integers the scale itself (1 more for a zero's own rounding), of E4M3 a sixteenth and
    # of E2M1 a sixth of the value, and what a rounded scale (1/16 of E4M3, up to twice of a power of two) saturates
    half = {"i8": 0.6 / 127, "i4": 0.6 / 7, "u4": 1.1 / 7.5, "f8e4m3": 1 / 15, "f4e2m1": 0.3}[storage.type]
    assert float((found.dequantized() - weight).abs().max()) <= half * float(largest)


def test_a_searched_range_has_less_error_than_the_largest_magnitude() -> None:
    weight, _ = layer()
    for name in ("w4a16", "w4a16_asym"):
        plain, searched = (round_weight(weight, stored(name), how).dequantized() for how in ("max", "mse"))
        assert (searched - weight).norm() < (plain - weight).norm()


def test_second_order_rounding_beats_rounding_to_nearest() -> None:
    weight, inputs = layer()
    storage = stored("w4a16_gptq")
    plain = output_error(round_weight(weight, storage).dequantized(), weight, inputs)
    searched = output_error(round_weight(weight, storage, "mse").dequantized(), weight, inputs)
    found = output_error(round_second_order([(weight, storage)], inputs)[0].dequantized(), weight, inputs)
    assert found < 0.8 * min(plain, searched), (found, plain, searched)


@pytest.mark.parametrize("name", ["w4a16_gptq", "w8a16", "fp8", "nvfp4", "mxfp4"])
def test_second_order_rounding_of_every_kind_of_grid(name: str) -> None:
    weight, inputs = layer()
    storage = stored(name)
    found = output_error(round_second_order([(weight, storage)], inputs)[0].dequantized(), weight, inputs)
    plain = output_error(round_weight(weight, storage, "mse").dequantized(), weight, inputs)
    assert found < 0.7 * plain, found / plain


def test_each_pass_over_the_codes_leaves_less_error(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = layer()
    errors = []
    for passes in (0, 1, 4):
        monkeypatch.setattr(second_order, "PASSES", passes)
        found = round_second_order([(weight, stored("w4a16_gptq"))], inputs)[0].dequantized()
        errors.append(output_error(found, weight, inputs))
    assert errors[2] < errors[1] < 0.98 * errors[0], errors


def test_second_order_rounding_aims_at_outputs_before_any_rounding() -> None:
    """Inputs that earlier rounding moved in a way that this product can undo in part."""
    generator = torch.Generator().manual_seed(9)
    weight, _ = layer()
    exact = torch.randn(600, WIDTH, generator=generator)
    x = exact + 0.2 * torch.roll(exact, 1, -1)
    storage = stored("w4a16_gptq")

    def error(inputs: Inputs) -> float:
        found = round_second_order([(weight, storage)], inputs)[0].dequantized()
        return float((x @ found.T - exact @ weight.T).square().mean())

    assert error(gather([x[:300], x[300:]], [exact[:300], exact[300:]])) < 0.5 * error(gather([x]))


def test_second_order_rounding_by_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens for each input, neighbours alike as in a text: what their inputs share counts less than it seems."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5

    def text(length: int) -> torch.Tensor:
        x = torch.randn(length, WIDTH, generator=generator)
        for here, before in zip(x[1:], x[:-1], strict=True):
            here.mul_(0.19**0.5).add_(before, alpha=0.9)
        return x @ mix

    seen, later = text(2 * WIDTH), gather([text(4096)])
    weight, linear = torch.randn(OUT, WIDTH, generator=generator), Linear("w", stored("w4a16_gptq"), GPTQ)

    def error() -> float:
        parts = quantized([linear], [seen], [seen], {"w": weight}.__getitem__)
        codes = Quantized(*(parts[f"w.{part}"] for part in ("codes", "scale", "zero")), None, linear.storage.block)
        return output_error(codes.dequantized(), weight, later)

    drawn = error()
    monkeypatch.setattr(shared_input, "UNSURE", 0.0)
    assert drawn < 0.95 * error()


@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_second_order_rounding_in_groups(group: int) -> None:
    weight, inputs = layer()
    recipe = load_recipe("w4a16_gptq")
    assert recipe.weights is not None
    kind = recipe.weights.model_copy(update={"group": (group,)} if group > 0 else {"per": "row", "group": ()})
    storage = storage_of(recipe.model_copy(update={"weights": kind}), (OUT, WIDTH))
    assert isinstance(storage, Storage)
    assert storage.scale_shape == (OUT, WIDTH // group if group > 0 else 1)
    found = output_error(round_second_order([(weight, storage)], inputs)[0].dequantized(), weight, inputs)
    assert found < output_error(round_weight(weight, storage).dequantized(), weight, inputs)


def test_second_order_rounding_of_weights_that_share_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go together, in pieces that end within a weight; each gets what it gets alone."""
    monkeypatch.setattr(second_order, "ROWS", 40)
    weight, inputs = layer()
    storage = stored("w4a16_gptq")
    both = round_second_order([(weight, storage), (-2 * weight, storage)], inputs)
    for found, given in zip(both, (weight, -2 * weight), strict=True):
        alone = round_second_order([(given, storage)], inputs)[0]
        assert (found.codes != alone.codes).float().mean() < 0.01  # sums in another order
        assert torch.equal(found.scale, alone.scale)


@pytest.mark.parametrize("stale", [0, 5])
def test_inputs_of_any_condition(stale: int) -> None:
    """The factor of the inverse moments, also where inputs depend on each other or are always zero."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, WIDTH, generator=generator) * torch.logspace(-2, 2, WIDTH)
    x[:, :stale] = 0
    shared = second_order._Shared.of(gather([x]))
    product = shared.inverse.T @ shared.inverse @ shared.moment
    assert (product - torch.eye(WIDTH)).abs().max() < 0.05


def test_second_moments_of_many_inputs() -> None:
    """The half that is computed and the half that is mirrored."""
    x = torch.randn(50, 600, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(gather([x[:20], x[20:]]).products, x.T @ x / 50, rtol=1e-4, atol=1e-5)


def test_awq_protects_the_weights_that_meet_large_inputs() -> None:
    weight, inputs = layer(outliers=30.0)
    recipe, storage = load_recipe("w4a16_awq"), stored("w4a16_awq")
    factors = smoothing(recipe, inputs, [(weight, storage)])
    assert float(factors[:4].mean()) < float(factors[4:].mean())  # their weights are made larger
    plain = output_error(round_weight(weight, storage).dequantized(), weight, inputs)
    found = round_weight(weight / factors, storage).dequantized() * factors
    assert output_error(found, weight, inputs) < 0.5 * plain
    clip = clipped(weight / factors, storage, inputs.smoothed(factors)).codes(weight / factors, storage)
    assert output_error(clip.dequantized() * factors, weight, inputs) <= output_error(found, weight, inputs)


@pytest.mark.parametrize("name", ["w8a8_sq", "w8a8_sq_static", "w8a8_sq_tensor"])
def test_smoothquant_takes_outliers_out_of_activations(name: str) -> None:
    weight, inputs = layer(outliers=100.0)
    recipe, storage = load_recipe(name), stored(name)

    def error(factors: torch.Tensor) -> float:
        rows = rounded_inputs(recipe, inputs.smoothed(factors))
        found = rows @ round_weight(weight / factors, storage).dequantized().mT
        return float((found - inputs.rows @ weight.mT).square().sum())

    factors = smoothing(recipe, inputs, [(weight, storage)])
    assert error(factors) < 0.3 * error(torch.ones(WIDTH))


def test_static_ranges() -> None:
    _, inputs = layer()
    rows = inputs.rows.clone()
    rows[0, 0] = 500.0
    spoiled = replace(inputs, rows=rows, largest=torch.maximum(inputs.largest, rows.abs().amax(0)))
    scales = {}
    for how in ("max", "percentile", "mse"):
        recipe = load_recipe("w8a8_sq_static")
        assert recipe.activations is not None
        kind = recipe.activations.model_copy(update={"range": how})
        scales[how] = float(static_parts(recipe.model_copy(update={"activations": kind}), spoiled)["input_scale"])
    assert scales["max"] == pytest.approx(500.0 / 127)
    assert scales["percentile"] < 0.5 * scales["max"]
    assert scales["mse"] <= scales["max"]


def test_inputs_that_are_not_finite() -> None:
    weight, inputs = layer()
    broken = replace(inputs, moment=torch.full_like(inputs.products, float("nan")))
    check_raises("PREC-014", round_second_order, [(weight, stored("w4a16_gptq"))], broken)
