"""Beams on the emulated GPU: blocks are copied in the stream, codes with the scales of their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from compiler.api import compile_with, prepare, weights_of
from specs.precision import load_recipe
from tests.precision.models import MODELS


@pytest.mark.usefixtures("gpu")
def test_scores_are_those_of_the_whole_texts(tmp_path: Path) -> None:
    """A block that is copied to a wrong place, too late or in part gives other scores; 31 and 4 tokens fill a block."""
    options: dict[str, Any] = {"size": "tiny", "weights": "random", "max_sequence": 64, "max_batch": 2}
    options |= {"precision": "fp16", "kv_cache": "int8", "target": "sm90", "toolchain": "tensorrt-8.6"}
    prepared = prepare(MODELS / "llama.yaml", out=tmp_path / "bundle", **options)
    model = runtime.load(compile_with(prepared, weights_of(prepared)))
    copied: list[tuple[int, int]] = []
    copy: Any = model.executable.copy_blocks

    def recorded(pairs: list[tuple[int, int]]) -> None:
        copied.extend(pairs)
        copy(pairs)

    model.executable.copy_blocks = recorded  # type: ignore[method-assign]
    prompt = np.random.default_rng(4).integers(0, prepared.source.config["vocab"], 31).tolist()
    (found,) = model.search([prompt], num_beams=2, num_return_sequences=2, max_new_tokens=4, stop=())
    assert copied
    assert model.engine.free_blocks == model.executable.blocks
    for beam in found:
        logits = model.logits([[*prompt, *beam.ids[:-1]]])[0][len(prompt) - 1 :].astype(np.float64)
        odds = logits - logits.max(1, keepdims=True)
        odds -= np.log(np.exp(odds).sum(1, keepdims=True))
        score = odds[np.arange(4), beam.ids].mean()
        # the recipe's bound on logits, by which each logarithm may differ twice
        assert abs(score - beam.score) <= 2 * load_recipe("fp16").bound.relative * np.abs(logits).max()
