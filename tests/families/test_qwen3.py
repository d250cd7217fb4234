"""An RMS norm on each query and key head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families.harness import check_fuses, check_golden_ir, check_transformers

pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 144, "hidden_size": 40, "intermediate_size": 104, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 96, "pad_token_id": None,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "tied": ({"tie_word_embeddings": True}, {"sliding_window": None}),
    "biases": ({"attention_bias": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}, None),
    "window": ({**WINDOW, "num_key_value_heads": 1}, {}),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
              "original_max_position_embeddings": 16}}, {}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    config, hub = VARIANTS[variant]
    check_transformers("Qwen3", tmp_path / "model", {**BASE, **config}, hub, lengths=(1, 5, 6, 41))


def test_golden() -> None:
    check_golden_ir("qwen3", "qwen3", "8b")
    check_fuses("qwen3", "8b", norms=5, attentions=1, gated=1)
