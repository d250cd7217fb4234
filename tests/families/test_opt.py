"""Positions from the third row on, norms before or after, a narrower embedding, norms without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families.harness import (
    check_decoder,
    check_golden_ir,
    check_transformers,
    logits_of,
    rename_tensors,
    saved,
    write_config,
)

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 3, "ffn_dim": 80, "num_attention_heads": 3,
    "max_position_embeddings": 64, "word_embed_proj_dim": 48,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "post-norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 20},
    "projected": {"word_embed_proj_dim": 64, "tie_word_embeddings": False},
    "galactica": {"activation_function": "gelu", "enable_bias": False, "layer_norm_elementwise_affine": False},
    "no-biases": {"enable_bias": False, "num_attention_heads": 6},
    "no-final-norm": {"_remove_final_layer_norm": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    check_transformers("OPT", tmp_path / "model", {**BASE, **VARIANTS[variant]})


def test_hub_spelling(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = saved("OPT", folder, BASE)
    rename_tensors(folder, lambda name: name.removeprefix("model."))
    absent = ("tie_word_embeddings", "enable_bias", "layer_norm_elementwise_affine", "_remove_final_layer_norm")
    write_config(folder, prefix="</s>", **dict.fromkeys(absent))
    check_decoder(folder, logits_of(model), 300)


@pytest.mark.parametrize("size", ["350m", "6.7b"])
def test_golden(size: str) -> None:
    check_golden_ir(f"opt-{size}", "opt", size)
