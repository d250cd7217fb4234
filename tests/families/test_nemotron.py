"""Layer norms of gain 1 + weight, squared relu, partial rotation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families.harness import check_fuses, check_golden_ir, check_transformers

pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 130, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 96,
}  # fmt: skip
WHOLE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "half": ({}, {}),
    "wide-heads-biases": ({"head_dim": 16, "attention_bias": True, "mlp_bias": True, "norm_eps": 1e-3}, None),
    "tied-whole": ({"tie_word_embeddings": True, "num_key_value_heads": 6, "rope_parameters": WHOLE}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    config, hub = VARIANTS[variant]
    check_transformers("Nemotron", tmp_path / "model", {**BASE, **config}, hub, lengths=(1, 9, 41))


def test_golden() -> None:
    check_golden_ir("nemotron", "nemotron", "minitron-4b")
    check_fuses("nemotron", "minitron-4b", norms=3, attentions=1)
