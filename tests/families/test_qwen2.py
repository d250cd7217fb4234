"""Biases on q, k and v, and a window on the layers that config.json names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families.harness import check_fuses, check_golden_ir, check_transformers

pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 152, "hidden_size": 56, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 7,
    "num_key_value_heads": 1, "max_position_embeddings": 96, "pad_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
# What transformers 4 wrote of these: the window stays in config.json also where it is not used.
OFF = {"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 1}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "window-not-used": ({"tie_word_embeddings": True}, OFF),
    "window-of-later-layers": (WINDOW, {}),
    "layer-types": (
        {**WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
         "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    config, hub = VARIANTS[variant]
    check_transformers("Qwen2", tmp_path / "model", {**BASE, **config}, hub, lengths=(1, 6, 7, 41))


def test_golden() -> None:
    check_golden_ir("qwen2", "qwen2", "7b")
    check_fuses("qwen2", "7b", norms=3, attentions=1, gated=1)
