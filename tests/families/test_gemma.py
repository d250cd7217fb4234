"""Scaled embeddings and gains of 1 + weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families.harness import check_fuses, check_golden_ir, check_transformers

pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 130, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 96,
}  # fmt: skip
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    # what first configs say of the activation
    "one-key-head": ({}, {"hidden_act": "gelu", "hidden_activation": None}),
    "untied-biases": ({"num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": False}, None),
    "linear": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
               {"hidden_activation": "gelu_pytorch_tanh"}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    config, hub = VARIANTS[variant]
    check_transformers("Gemma", tmp_path / "model", {**BASE, **config}, hub, lengths=(1, 9, 41))


def test_golden() -> None:
    check_golden_ir("gemma", "gemma", "7b")
    check_fuses("gemma", "7b", norms=3, attentions=1, gated=1)
