"""The checkpoint that the repository ships: numbers against transformers, text like its training data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import compiler
import runtime
from tests.e2e.test_against_transformers import TOLERANCE, reference_greedy, reference_logits

transformers = pytest.importorskip("transformers")
DEMO = Path(__file__).parents[2] / "demo" / "tiny-llama"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> runtime.Model:
    return runtime.load(compiler.compile(DEMO, out=tmp_path_factory.mktemp("demo") / "bundle"))


def test_logits_and_greedy_ids_agree_with_transformers(model: runtime.Model) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype="float32").eval()
    tokens = np.load(DEMO / "calibration-tokens.npy").reshape(-1)
    rows = [tokens[start : start + size].tolist() for start, size in ((0, 200), (300, 31), (900, 64))]
    for row, logits in zip(rows, model.logits(rows), strict=True):
        np.testing.assert_allclose(logits, reference_logits(reference, row), rtol=0, atol=TOLERANCE)
    assert model.generate(rows, max_new_tokens=64, stop=()) == [reference_greedy(reference, row, 64) for row in rows]


def test_text_continues_a_known_verse(model: runtime.Model) -> None:
    assert "the LORD" in model.text("In the beginning God created the heaven and", max_new_tokens=8)
