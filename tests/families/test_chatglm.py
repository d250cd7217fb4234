"""The first generation: the vendor's case, and its variants against PyTorch lines that agree with that case."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

import compiler
import runtime
from tests.families.harness import REFERENCE, check_case, check_fuses, check_golden_ir, greedy_of, rows_of
from tests.golden_errors import check_raises

CASE = REFERENCE / "chatglm-6b"
BOS, MASK, GMASK = 316, 312, 313


class Reference:
    """The equations of the paper on a checkpoint; positions and mask as the vendor's code computes them."""

    def __init__(self, folder: Path, *, two_streams: bool = True) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.two_streams = two_streams

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(
            x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-5
        )

    def streams(self, tokens: list[int]) -> list[torch.Tensor]:
        prefix, blank = tokens.index(BOS), tokens.index(GMASK if GMASK in tokens else MASK)
        first = torch.arange(len(tokens))
        if self.two_streams or GMASK not in tokens:
            first[prefix:] = blank
        second = torch.cat((torch.zeros(prefix), torch.arange(len(tokens) - prefix) + 1))
        return [first, second] if self.two_streams else [first]

    def turned(self, x: torch.Tensor, streams: list[torch.Tensor]) -> torch.Tensor:
        shares = []
        for share, at in zip(x.chunk(len(streams), -1), streams, strict=True):
            dims = share.shape[-1]
            frequencies = (1.0 / 10000 ** (torch.arange(0, dims, 2) / dims)).half().float()
            angle = (at[:, None].float() * frequencies)[:, None]
            (a, b), cos, sin = share.chunk(2, -1), angle.cos(), angle.sin()
            shares.append(torch.cat((a * cos - b * sin, b * cos + a * sin), -1))
        return torch.cat(shares, -1)

    def logits(self, tokens: list[int]) -> np.ndarray:
        heads, layers = self.config["num_attention_heads"], self.config["num_layers"]
        x = self.weights["transformer.word_embeddings.weight"][tokens]
        alpha, streams = math.sqrt(2 * layers), self.streams(tokens)
        place = torch.arange(len(tokens))
        seen = (place[None] <= place[:, None]) | (place[None] < tokens.index(BOS))
        for layer in range(layers):
            name = f"transformer.layers.{layer}"
            h = self.norm(f"{name}.input_layernorm", x)
            fused = self.linear(f"{name}.attention.query_key_value", h).unflatten(-1, (heads, 3, -1))
            q, k, v = fused.unbind(2)
            q, k = self.turned(q, streams), self.turned(k, streams)
            scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
            mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v).flatten(1)
            x = alpha * h + self.linear(f"{name}.attention.dense", mixed)
            m = self.norm(f"{name}.post_attention_layernorm", x)
            up = functional.gelu(self.linear(f"{name}.mlp.dense_h_to_4h", m), approximate="tanh")
            x = alpha * m + self.linear(f"{name}.mlp.dense_4h_to_h", up)
        return self.linear("lm_head", self.norm("transformer.final_layernorm", x)).numpy()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> runtime.Model:
    return check_case("chatglm-6b", tmp_path_factory.mktemp("glm") / "bundle")


def test_agrees_with_the_vendor(model: runtime.Model) -> None:
    assert model.role == "decoder"
    cases = load_file(CASE / "cases.safetensors")
    rows = rows_of(cases["left.input_ids"].numpy(), cases["left.attention_mask"].numpy())
    mine = Reference(CASE)
    for row, padded in zip(rows, cases["left.logits"].numpy(), strict=True):
        np.testing.assert_allclose(mine.logits(row), padded[-len(row) :], rtol=0, atol=2e-5)


@pytest.mark.parametrize("mask", [GMASK, MASK])
def test_one_stream(mask: int, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(CASE / "model.safetensors")
    config = json.loads((CASE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "position_encoding_2d": False}))
    own = runtime.load(compiler.compile(folder, out=tmp_path / "bundle"))
    reference = Reference(folder, two_streams=False)
    rows = [[5, 9, mask, BOS, 3], [8, 7, mask, 40, 41, 42, 43, BOS], [mask, BOS, 1, 2, 3, 4]]
    for row, found in zip(rows, own.logits(rows), strict=True):
        np.testing.assert_allclose(found, reference.logits(row), rtol=0, atol=2e-4)
    expected = [greedy_of(reference.logits, row, 8) for row in rows]
    assert min(lead for _, lead in expected) > 4e-4
    assert own.generate(rows, max_new_tokens=8, stop=()) == [ids for ids, _ in expected]


def test_other_sequences_change_nothing(tmp_path: Path) -> None:
    """Prompts of all kinds in flight together, more than fit at once, with blocks taken away: each as alone."""
    bundle = compiler.compile(CASE, out=tmp_path / "bundle", max_batch=3, max_sequence=80)
    small = runtime.load(bundle, cache_tokens=128, step_tokens=16)
    generator = np.random.default_rng(6)
    rows = [
        [*generator.integers(0, 300, length).tolist(), mask, *generator.integers(0, 300, gap).tolist(), BOS]
        for length, gap, mask in [
            (3, 0, GMASK),
            (40, 0, GMASK),
            (5, 6, MASK),
            (33, 0, GMASK),
            (0, 9, MASK),
            (20, 2, MASK),
        ]
    ]
    together = small.generate(rows, max_new_tokens=30, stop=())
    assert small.engine.preemptions > 0
    reference = Reference(CASE)
    for row, new in zip(rows, together, strict=True):
        ids, lead = greedy_of(reference.logits, row, 30)
        assert lead > 4e-4
        assert new == ids


def test_a_prompt_without_its_marks(model: runtime.Model) -> None:
    check_raises("RUN-017", model.logits, [[GMASK, BOS, 5], [1, 2, GMASK]])
    check_raises("RUN-017-either", model.generate, [[1, BOS]])
    row = [1, 7, GMASK, BOS, 5]
    derived, given, other = model.logits([row, row, row], prefix=[3, 3, 1], blank=[2, 2, 0])
    np.testing.assert_array_equal(derived, given)
    np.testing.assert_allclose(derived, model.logits([row])[0], rtol=0, atol=1e-5)
    assert np.abs(derived - other).max() > 0.1


def test_golden() -> None:
    check_golden_ir("chatglm", "chatglm", "6b")
    check_fuses("chatglm", "6b", norms=3, attentions=1)
