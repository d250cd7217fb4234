"""Layer norms, biases everywhere or nowhere, windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families.harness import check_fuses, check_golden_ir, check_transformers

pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 130, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
HUB = {
    "attention_softmax_in_fp32": True, "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True,
    "mlp_type": "default", "norm_type": "layer_norm", "layer_norm_epsilon": 1e-5, "residual_dropout": 0.1,
    "embedding_dropout": 0.1, "tie_word_embeddings": None,
}  # fmt: skip
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "window": ({"sliding_window": 7}, HUB),
    "untied-no-biases": ({"use_bias": False, "tie_word_embeddings": False, "num_key_value_heads": 1}, None),
    "mha": ({"num_attention_heads": 6, "num_key_value_heads": 6, "norm_epsilon": 1e-3}, {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    config, hub = VARIANTS[variant]
    check_transformers("Starcoder2", tmp_path / "model", {**BASE, **config}, hub, lengths=(1, 7, 8, 41))


def test_golden() -> None:
    check_golden_ir("starcoder2", "starcoder2", "3b")
    check_fuses("starcoder2", "3b", norms=3, attentions=1)
