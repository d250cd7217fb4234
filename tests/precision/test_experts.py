"""Experts under calibration: better than rounding to nearest on other tokens, whatever number of tokens they get."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from compiler.api import float_weights, prepare, weights_of
from compiler.ir.ops import REGISTRY
from compiler.passes.quantization_plan import Linear, Storage, storage_of
from compiler.precision.lints import lints
from compiler.quantization.experts import Routed, product, quantized_experts, seldom, shrunk
from compiler.quantization.rounding import Quantized, round_weight
from compiler.quantization.second_order import round_second_order
from compiler.quantization.statistics import gather
from compiler.validate.metrics import agreement
from compiler.validate.reference import outputs
from specs.precision import FOLDER, load_recipe
from tests.precision.models import MODELS, calibration, options, quantized_graph

WIDTH, OUT, EXPERTS = 64, 32, 3


def alone(recipe: str, folder: Path) -> str:
    """A recipe that leaves everything but experts as it is."""
    text = (FOLDER / f"{recipe}.yaml").read_text(encoding="utf-8")
    path = folder / f"{recipe}.yaml"
    path.write_text(text.replace("linears: [head, embed]", 'linears: [head, embed, "attn.*"]'), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_calibrated_experts_beat_rounding_to_nearest(family: str, tmp_path: Path) -> None:
    rows = np.random.default_rng(9).integers(0, 300, (6, 64)).tolist()
    found = {}
    for recipe in ("w4a16_asym", "w4a16_gptq", "w4a16_awq"):
        asked = options(tmp_path, alone(recipe, tmp_path))
        if "calibration" in asked:
            asked["calibration"] = calibration(tmp_path, count=2048)
        prepared = prepare(MODELS / f"{family}.yaml", out=tmp_path / "bundle", **asked)
        assert prepared.precision.plan is not None
        assert {linear.experts for linear in prepared.precision.plan.linears.values()} == {True}
        exact = [row["logits"] for row in outputs(prepared.built.graph, float_weights(prepared), rows)]
        rounded = outputs(quantized_graph(prepared), weights_of(prepared), rows)
        found[recipe] = agreement([row["logits"] for row in rounded], exact)
    assert found["w4a16_gptq"].mean_kl < 0.8 * found["w4a16_asym"].mean_kl, found  # seen: 0.65 to 0.75
    assert found["w4a16_awq"].mean_kl < found["w4a16_asym"].mean_kl, found


def test_one_expert_is_widened_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widened: list[int] = []
    plain = Quantized.dequantized

    def dequantized(self: Quantized) -> torch.Tensor:
        widened.append(self.codes.ndim)
        return plain(self)

    monkeypatch.setattr(Quantized, "dequantized", dequantized)
    weights_of(prepare(MODELS / "mixtral.yaml", out=tmp_path / "bundle", **options(tmp_path, "w4a16_gptq")))
    assert set(widened) == {2}


def linear(recipe: str = "w4a16_gptq") -> Linear:
    found = load_recipe(recipe)
    storage = storage_of(found, (EXPERTS, OUT, WIDTH))
    assert isinstance(storage, Storage)
    return Linear("layers.0.moe.up.weight", storage, found)


def inputs(tokens: int) -> torch.Tensor:
    """Tokens with correlated channels."""
    generator = torch.Generator().manual_seed(7)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    return torch.randn(4000, WIDTH, generator=generator)[-tokens:] @ mix


@pytest.mark.parametrize("recipe", ["w4a16_gptq", "w4a16_awq"])
def test_an_expert_without_tokens_is_rounded_to_nearest(recipe: str, tmp_path: Path) -> None:
    weight = torch.randn(EXPERTS, OUT, WIDTH, generator=torch.Generator().manual_seed(1))
    chosen = torch.tensor([[0, 1]]).expand(300, 2).clone()
    chosen[2, 1] = 2  # expert 2 gets one token
    found = quantized_experts([linear(recipe)], [Routed(inputs(300)[:, None], chosen)], lambda _: weight)
    name, storage = linear(recipe).weight, linear(recipe).storage.of_one()
    assert found[f"{name}.tokens"].tolist() == [300, 299, 1]
    assert seldom(linear(recipe), found[f"{name}.tokens"]) == (2,)
    nearest = [round_weight(one, storage, "mse") for one in weight]
    same = [torch.equal(found[f"{name}.codes"][number], nearest[number].codes) for number in range(EXPERTS)]
    assert same == [False, False, True]

    prepared = prepare(MODELS / "mixtral.yaml", out=tmp_path / "bundle", **options(tmp_path, recipe))
    assert prepared.precision.plan is not None
    prepared.precision.plan.seldom[name] = (2,)
    assert any(lint.text.startswith("layers.0.moe.up[2] got fewer tokens") for lint in lints(prepared))


@pytest.mark.parametrize("tokens", [8, 16, 32, 64, 128])
def test_few_tokens_do_not_make_it_worse(tokens: int) -> None:
    weight = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(1))
    storage, other = linear().storage.of_one(), gather([inputs(4000)[:3000]]).products

    def error(found: Quantized) -> float:
        apart = found.dequantized() - weight
        return float(((apart @ other) * apart).sum())

    nearest, seen = error(round_weight(weight, storage, "mse")), gather([inputs(tokens)])
    found = error(round_second_order([(weight, storage)], shrunk(seen, inputs(tokens)))[0])
    assert found < 1.05 * nearest, found / nearest  # 64 inputs: from 1 in 8 on
    if tokens in (8, 16, 32):
        assert error(round_second_order([(weight, storage)], seen)[0]) > 1.2 * nearest


def test_products_are_those_of_the_graph() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(EXPERTS, OUT, WIDTH, generator=generator)
    for rows in (1, 2):
        x = torch.randn(5, 7, rows, WIDTH, generator=generator)
        chosen = torch.randint(0, EXPERTS, (5, 7, 2), generator=generator)
        found = product([Routed(x, chosen), Routed(x[:1], chosen[:1])], weight.__getitem__, EXPERTS, OUT)
        wanted = REGISTRY["gather_matmul"].body(x, weight, chosen)
        torch.testing.assert_close(found[0], wanted)
        torch.testing.assert_close(found[1], wanted[:1])
