"""Both spellings of the fourth generation: interleaved partial rotation, and in the later one norms on both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families.harness import check_fuses, check_golden_ir, check_transformers

pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 130, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 96, "pad_token_id": None,
}  # fmt: skip
QUARTER = {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.25}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "biases": ({}, {}),
    "quarter": ({"attention_bias": False, "num_key_value_heads": 1, "rope_parameters": QUARTER}, {}),
    "tied": ({"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "head_dim": 24, "num_key_value_heads": 4}, None),
}


@pytest.mark.parametrize("kind", ["Glm", "Glm4"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, kind: str, tmp_path: Path) -> None:
    config, hub = VARIANTS[variant]
    check_transformers(kind, tmp_path / "model", {**BASE, **config}, hub, lengths=(1, 9, 41))


def test_golden() -> None:
    check_golden_ir("glm", "glm", "9b")
    check_fuses("glm", "9b", norms=3, attentions=1, gated=1)
    check_golden_ir("glm4", "glm4", "9b")
    check_fuses("glm4", "9b", norms=5, attentions=1, gated=1)
