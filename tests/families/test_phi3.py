"""Fused products, partial rotation, windows, and frequencies that depend on a sequence's length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compiler
import runtime
from tests.families.harness import (
    TOLERANCE,
    as_hub,
    check_fuses,
    check_golden_ir,
    check_transformers,
    logits_of,
    prompts,
    save_random,
)

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 136, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def longrope(pairs: int, **more: Any) -> dict[str, Any]:
    factors = {"short_factor": [1 + 0.1 * i for i in range(pairs)], "long_factor": [1.5 + i for i in range(pairs)]}
    return {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **factors, **more}}


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "window": ({"sliding_window": 6, "num_key_value_heads": 4}, {}),
    "tied-partial": (
        {"tie_word_embeddings": True,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        {"attention_bias": False, "lm_head_bias": False, "interpolate_factor": 1, "full_attn_mod": 1},
    ),
    # rows of 1, 7 and 8 tokens stay within the original context of 24 tokens, 41 starts beyond it
    "longrope": ({**longrope(6), "original_max_position_embeddings": 24}, None),
    "longrope-partial": (
        {**longrope(3, partial_rotary_factor=0.5), "original_max_position_embeddings": 24, "sliding_window": 9,
         "num_attention_heads": 4, "num_key_value_heads": 1},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    config, hub = VARIANTS[variant]
    check_transformers("Phi3", tmp_path / "model", {**BASE, **config}, hub, lengths=(1, 7, 8, 41))


def test_the_first_name_of_longrope_and_prompts_in_pieces(tmp_path: Path) -> None:
    """`su` is what first configs say; a prompt beyond the original context is long also where a step takes a piece."""
    config = transformers.Phi3Config(**BASE, **longrope(6), original_max_position_embeddings=24)
    reference = save_random(transformers.Phi3ForCausalLM(config), tmp_path / "model")
    named = {**longrope(6)["rope_parameters"], "rope_theta": None, "rope_type": None, "type": "su"}
    as_hub(tmp_path / "model", rope_scaling=named)
    model = runtime.load(compiler.compile(tmp_path / "model", out=tmp_path / "bundle"), step_tokens=16)
    rows = prompts(136, 60, 9)
    for tokens, found in zip(rows, model.logits(rows), strict=True):
        np.testing.assert_allclose(found, logits_of(reference)(tokens), rtol=0, atol=TOLERANCE)


def test_lengths_are_an_input_only_where_they_matter(tmp_path: Path) -> None:
    config = transformers.Phi3Config(**BASE, **longrope(6), original_max_position_embeddings=24)
    transformers.Phi3ForCausalLM(config).save_pretrained(tmp_path)
    for longest, expected in ((24, False), (25, True)):
        graph = compiler.prepare(tmp_path, max_sequence=longest).graph
        assert ("lengths" in [value.name for value in graph.inputs]) is expected


def test_golden() -> None:
    check_golden_ir("phi3", "phi3", "4-mini")
    check_fuses("phi3", "4-mini", norms=3, attentions=1, gated=1)
