"""The demo model through OpenVINO: batching, chunks, preemption and settings leave its tokens as they are."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

import compiler
import runtime

DEMO = Path(__file__).parents[2] / "demo" / "tiny-llama"
TOLERANCE = 2e-4  # absolute, on logits: the project's pass mark for float32 engines (issue 2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiler.compile(DEMO, out=tmp_path_factory.mktemp("openvino") / "bundle")


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    tokens = np.load(DEMO / "calibration-tokens.npy").reshape(-1)
    return [
        tokens[start : start + size].tolist() for start, size in ((0, 70), (300, 3), (500, 33), (700, 1), (800, 120))
    ]


@pytest.fixture(scope="module")
def alone(bundle: Path, rows: list[list[int]]) -> list[list[int]]:
    model = runtime.load(bundle)
    return [model.generate([row], max_new_tokens=40, stop=())[0] for row in rows]


@pytest.mark.parametrize("options", [{}, {"step_tokens": 16}, {"cache_tokens": 256}, {"threads": 1}], ids=str)
def test_ids_are_those_of_each_row_alone(
    options: dict[str, int], bundle: Path, rows: list[list[int]], alone: list[list[int]]
) -> None:
    model = runtime.load(bundle, **options)
    assert model.generate(rows, max_new_tokens=40, stop=()) == alone
    assert (model.engine.preemptions > 0) == ("cache_tokens" in options)


def test_logits_in_pieces_are_the_logits(bundle: Path, rows: list[list[int]]) -> None:
    whole, pieces = runtime.load(bundle).logits(rows), runtime.load(bundle, step_tokens=8).logits(rows)
    for one, other in zip(whole, pieces, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)


def test_outputs_outlive_the_next_call(bundle: Path, rows: list[list[int]]) -> None:
    model = runtime.load(bundle)
    (first,) = model.logits(rows[:1])
    kept = first.copy()
    model.logits(rows)
    np.testing.assert_array_equal(first, kept)


def test_the_cache_is_reported_before_it_is_taken(
    bundle: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO, "runtime"):
        model = runtime.load(bundle, cache_tokens=100)
    assert (model.executable.blocks, model.executable.block_size) == (4, 32)
    assert model.executable.cache_bytes == 4 * 6 * 32 * 4 * 64 * 4
    assert "KV cache: 128 tokens" in caplog.text
    monkeypatch.setattr("runtime.openvino_executable.available_memory", lambda: 40_000_000)
    caplog.clear()
    model = runtime.load(bundle)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert model.executable.cache_bytes < 20_000_000


def test_text_streams(bundle: Path) -> None:
    model = runtime.load(bundle)
    prompt = "In the beginning God created the heaven and"
    text = model.text(prompt, max_new_tokens=24)
    pieces = list(model.text_stream(prompt, max_new_tokens=24))
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert text.startswith(" ")
    (ids,) = model.generate([model.encode(prompt)], max_new_tokens=24)
    assert model.decode(ids, after=model.encode(prompt)) == text
