"""One norm for attention and MLP, interleaved rotation of a part of each head, a head with a bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

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
    "vocab_size": 300, "n_positions": 128, "n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "partial": {},
    "whole": {"rotary_dim": 16, "n_inner": 100, "activation_function": "gelu"},
    "tied": {"n_head": 2, "rotary_dim": 6, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    check_transformers("GPTJ", tmp_path / "model", {**BASE, **VARIANTS[variant]}, lengths=(1, 23, 90))


def test_hub_spelling(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = saved("GPTJ", folder, BASE)
    buffers = {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e9) for layer in range(3)}
    rename_tensors(folder, str, **buffers)
    write_config(folder, rotary=True, scale_attn_weights=True, summary_type="cls_index", tie_word_embeddings=None)
    check_decoder(folder, logits_of(model), 300)


def test_golden() -> None:
    check_golden_ir("gptj", "gptj", "6b")
