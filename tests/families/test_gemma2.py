"""Capped scores and logits, windows on every other layer, norms before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import compiler
from specs.errors import SpecRTError
from tests.families.harness import check_fuses, check_golden_ir, check_transformers, write_config

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 130, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 96, "sliding_window": 6,
    "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0,
}  # fmt: skip
TYPES = ["full_attention", "sliding_attention", "sliding_attention"]
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "capped": ({}, {"cache_implementation": "hybrid"}),
    "no-caps": ({"attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": TYPES}, None),
    "untied-biases": ({"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": False}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    config, hub = VARIANTS[variant]
    check_transformers("Gemma2", tmp_path / "model", {**BASE, **config}, hub, lengths=(1, 6, 7, 41))


def test_attention_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**BASE)).save_pretrained(tmp_path)
    write_config(tmp_path, use_bidirectional_attention=True)
    with pytest.raises(SpecRTError, match="use_bidirectional_attention"):
        compiler.prepare(tmp_path)


def test_golden() -> None:
    check_golden_ir("gemma2", "gemma2", "27b")
    check_fuses("gemma2", "27b", norms=9, attentions=2, gated=2)
