"""Attention and MLP side by side or one after the other, fused QKV head by head, rotation of a part."""

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
    save_random,
    write_config,
)

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 100,
    "max_position_embeddings": 128,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "parallel": {},
    "sequential": {"use_parallel_residual": False, "hidden_act": "gelu_fast", "rotary_pct": 1.0},
    "no-attention-bias": {"attention_bias": False, "num_attention_heads": 2, "rotary_pct": 0.4},
    "tied": {"tie_word_embeddings": True, "rotary_emb_base": 5000, "layer_norm_eps": 1e-3},
    "scaled": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "rotary_pct": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    check_transformers("GPTNeoX", tmp_path / "model", {**BASE, **VARIANTS[variant]}, lengths=(1, 23, 90))


def test_hub_spelling(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    config = transformers.GPTNeoXConfig(**BASE, rotary_pct=0.5, rotary_emb_base=20000)
    model = save_random(transformers.GPTNeoXForCausalLM(config), folder)
    buffers = {
        f"gpt_neox.layers.{layer}.attention.{name}": torch.ones(4)
        for layer in range(3)
        for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
    }
    rename_tensors(folder, lambda name: name.replace("lm_head", "embed_out"), **buffers)
    write_config(folder, rope_parameters=None, rotary_pct=0.5, rotary_emb_base=20000, attention_bias=None)
    check_decoder(folder, logits_of(model), 300)


def test_golden() -> None:
    check_golden_ir("gpt_neox", "gpt_neox", "20b")
