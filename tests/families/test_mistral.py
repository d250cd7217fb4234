"""Windows on every layer, and heads that are not d_model / heads wide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families.harness import check_fuses, check_golden_ir, check_transformers

pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "sliding_window": None, "pad_token_id": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24}
# name: (config, rewritten to the hub's spelling)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "window": ({"sliding_window": 7}, {}),
    "window-new-spelling": ({"sliding_window": 1, "num_key_value_heads": 1}, None),
    "wide-heads": ({"head_dim": 20, "rms_norm_eps": 1e-5, "num_attention_heads": 4, "num_key_value_heads": 4}, {}),
    "tied-yarn": ({"tie_word_embeddings": True, "rope_parameters": YARN}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    config, hub = VARIANTS[variant]
    check_transformers("Mistral", tmp_path / "model", {**BASE, **config}, hub, lengths=(1, 7, 8, 41))


def test_golden() -> None:
    check_golden_ir("mistral", "mistral", "7b")
    check_fuses("mistral", "7b", norms=3, attentions=1, gated=1)
