"""Beam search on the CPU against `generate(num_beams=...)` of transformers in float32: the same ids, the same scores.

Scores are means of logarithms of probabilities: their tolerance is that of float32 logits, 2e-4 absolute, times the
two by which a logarithm of a softmax can differ, times NEW tokens over NEW to the length penalty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compiler
import runtime
from compiler.manifest import _beams
from tests.e2e.test_against_transformers import TOLERANCE
from tests.families.harness import prompts, saved
from tests.golden_errors import check_raises

transformers = pytest.importorskip("transformers")
DEMO = Path(__file__).parents[2] / "demo" / "tiny-llama"
NEW = 10


def reference(
    model: Any, tokens: list[int], new: int = NEW, stop: Any = None, **how: Any
) -> list[tuple[list[int], float]]:
    """Ids and scores of what transformers finds, best first."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=stop or None,
            pad_token_id=0, output_scores=True, return_dict_in_generate=True, **how,
        )  # fmt: skip
    found = []
    for row, score in zip(out.sequences[:, len(tokens) :].tolist(), out.sequences_scores.tolist(), strict=True):
        end = next((at + 1 for at, token in enumerate(row) if token in (stop or ())), len(row))
        found.append((row[:end], score))
    return found


def same(found: list[runtime.Hypothesis], expected: list[tuple[list[int], float]], penalty: float = 1.0) -> None:
    assert [one.ids for one in found] == [ids for ids, _ in expected]
    bound = 2 * TOLERANCE * max(1.0, NEW ** (1 - penalty))
    np.testing.assert_allclose([one.score for one in found], [score for _, score in expected], rtol=0, atol=bound)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[runtime.Model, Any, list[list[int]]]:
    model = runtime.load(compiler.compile(DEMO, out=tmp_path_factory.mktemp("beams") / "bundle"))
    tokens = np.load(DEMO / "calibration-tokens.npy").reshape(-1)
    rows = [
        tokens[start : start + size].tolist() for start, size in ((0, 70), (300, 3), (500, 33), (700, 1), (800, 64))
    ]
    return model, transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype="float32").eval(), rows


@pytest.mark.parametrize("count", [2, 4, 5])
def test_demo(count: int, demo: tuple[runtime.Model, Any, list[list[int]]]) -> None:
    """Prompts of different lengths together, a plain one among them, are those of each alone."""
    model, reference_model, rows = demo
    plain = model.engine.submit(rows[0], max_new_tokens=40)
    found = model.search(rows, num_beams=count, num_return_sequences=count, max_new_tokens=NEW, stop=())
    how = {"num_beams": count, "num_return_sequences": count}
    for row, one in zip(rows, found, strict=True):
        same(one, reference(reference_model, row, **how))
    while plain.finish is None:
        model.engine.step()
    assert plain.new == model.generate([rows[0]], max_new_tokens=40, stop=())[0]
    assert model.engine.free_blocks == model.executable.blocks


@pytest.mark.parametrize(
    ("penalty", "early"), [(-1.0, False), (0.0, "never"), (0.6, True), (2.0, "never"), (2.0, True)]
)
def test_stopping(penalty: float, early: Any, demo: tuple[runtime.Model, Any, list[list[int]]]) -> None:
    """With stop tokens that come early: some of what greedy search gives."""
    model, reference_model, rows = demo
    row = rows[1]
    stop = sorted({model.generate([row], max_new_tokens=NEW, stop=())[0][at] for at in (2, 4, 7)})
    how = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": penalty, "early_stopping": early}
    (found,) = model.search([row], max_new_tokens=NEW, stop=stop, **how)
    if penalty <= 0:  # favours short ones
        assert "stop" in [one.finish for one in found]
    same(found, reference(reference_model, row, stop=stop, **how), penalty)


def test_a_penalty_on_repetition(demo: tuple[runtime.Model, Any, list[list[int]]]) -> None:
    model, reference_model, rows = demo
    how = {"num_beams": 4, "num_return_sequences": 2, "repetition_penalty": 1.3}
    for row, found in zip(rows, model.search(rows, max_new_tokens=NEW, stop=(), **how), strict=True):
        same(found, reference(reference_model, row, **how))


def test_text_is_that_of_the_best(demo: tuple[runtime.Model, Any, list[list[int]]]) -> None:
    model, _, _ = demo
    prompt = "In the beginning God created"
    ids = model.encode(prompt)
    (best,) = model.search([ids], num_beams=3, max_new_tokens=8)[0]
    assert model.text(prompt, num_beams=3, max_new_tokens=8) == model.decode(best.ids, after=ids)


SMALL = {"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads, window": ("Mistral", {**SMALL, "num_key_value_heads": 2, "sliding_window": 16}),
    "linear biases": ("Bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "experts": ("Mixtral", {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    kind, config = FAMILIES[family]
    tokens = {"vocab_size": 160, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": None}
    reference_model = saved(kind, tmp_path / "model", {**config, **tokens})
    (tmp_path / "model" / "generation_config.json").write_text('{"num_beams": 4, "length_penalty": 0.5}')
    model = runtime.load(compiler.compile(tmp_path / "model", out=tmp_path / "bundle"))
    rows = prompts(160, 3, 27)
    how = {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.5}
    for row, found in zip(rows, model.search(rows, num_return_sequences=4, max_new_tokens=NEW), strict=True):
        same(found, reference(reference_model, row, **how), 0.5)


def test_a_bundle_searches_as_its_checkpoint_says(tmp_path: Path) -> None:
    path, stated = tmp_path / "generation_config.json", {"num_beams": 3, "early_stopping": "never"}
    assert _beams({**stated, "length_penalty": None, "top_k": 50}, path) == stated
    assert _beams({**stated, "do_sample": True}, path) == {}
    check_raises("CKPT-035", _beams, {"num_beams": "many"}, path)


def test_rows_of_codes_are_copied_whole(tmp_path: Path) -> None:
    """Over an 8-bit cache scores are those of the texts computed at once: a row's scale is copied with its codes."""
    model = runtime.load(compiler.compile(DEMO, out=tmp_path / "bundle", kv_cache="int8"))
    row = np.load(DEMO / "calibration-tokens.npy").reshape(-1)[500:533].tolist()
    for beam in model.search([row], num_beams=4, num_return_sequences=4, max_new_tokens=NEW, stop=())[0]:
        logits = model.logits([[*row, *beam.ids[:-1]]])[0][len(row) - 1 :]
        odds = torch.from_numpy(logits).log_softmax(-1).numpy()
        assert abs(odds[np.arange(NEW), beam.ids].mean() - beam.score) <= 2 * TOLERANCE
