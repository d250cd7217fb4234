"""Attention and MLP side by side on one norm, a part of each head rotated, a head with a bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families.harness import check_fuses, check_golden_ir, check_transformers

pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 130, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 96,
}  # fmt: skip
PART = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "hub": (PART, {"resid_pdrop": 0.1}),
    "grouped": ({**PART, "num_key_value_heads": 2, "layer_norm_eps": 1e-3}, None),
    "normed-queries": ({"hidden_size": 48, "qk_layernorm": True}, {}),
    "tied-linear": ({"tie_word_embeddings": True, "hidden_size": 32, "rope_parameters": {
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0, "partial_rotary_factor": 1.0}}, {}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    config, hub = VARIANTS[variant]
    check_transformers("Phi", tmp_path / "model", {**BASE, **config}, hub, lengths=(1, 9, 41))


def test_golden() -> None:
    check_golden_ir("phi", "phi", "2.7b")
    check_fuses("phi", "2.7b", norms=2, attentions=1)
