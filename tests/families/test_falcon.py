"""One or two norms beside each other or in a row, shared keys and values, linear biases in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families.harness import check_decoder, check_golden_ir, logits_of, save_random, write_config

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 512,
}  # fmt: skip
NEW = {"new_decoder_architecture": True, "num_attention_heads": 8, "num_kv_heads": 2}
RW = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "7b": {},
    "7b-bias": {"bias": True, "ffn_hidden_size": 100, "tie_word_embeddings": False},
    "40b": NEW,
    "11b": {**NEW, "num_ln_in_parallel_attn": 1, "rope_theta": 5000.0, "tie_word_embeddings": False},
    "many-heads": {"multi_query": False, "activation": "gelu_new"},
    "sequential": {"parallel_attn": False, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "rw": RW,
    "rw-odd-heads": {**RW, "hidden_size": 72, "num_attention_heads": 12},
    "rw-shared": {**RW, "multi_query": True, "parallel_attn": True, "hidden_size": 48, "num_attention_heads": 6},
    "rw-grouped": {**NEW, "alibi": True, "hidden_size": 48, "num_attention_heads": 6},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    config = transformers.FalconConfig(**{**BASE, **VARIANTS[variant]})
    # not eager, which adds the linear biases twice
    model = save_random(transformers.FalconForCausalLM(config), tmp_path / "model", attention="sdpa")
    # beyond 256 bfloat16 has no longer every position
    lengths = (1, 23, 300) if config.alibi else (1, 23, 60)
    check_decoder(tmp_path / "model", logits_of(model), 300, lengths=lengths)


@pytest.mark.parametrize("model_type", ["falcon", "RefinedWebModel", "RefinedWeb"])
def test_hub_spelling(model_type: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    grouped = model_type == "RefinedWeb"
    config = transformers.FalconConfig(**{**BASE, **(NEW if grouped else {})})
    model = save_random(transformers.FalconForCausalLM(config), folder)
    absent = ("rope_parameters", "num_ln_in_parallel_attn", "ffn_hidden_size", "tie_word_embeddings", "num_kv_heads")
    write_config(folder, model_type=model_type, apply_residual_connection_post_layernorm=False, **dict.fromkeys(absent))
    if model_type != "falcon":
        write_config(
            folder, n_layer=3, n_head=config.num_attention_heads, num_hidden_layers=None, num_attention_heads=None,
            n_head_kv=2 if grouped else None, new_decoder_architecture=None, multi_query=None if grouped else True,
        )  # fmt: skip
    check_decoder(folder, logits_of(model), 300)


@pytest.mark.parametrize("size", ["7b", "40b", "11b", "rw-1b"])
def test_golden(size: str) -> None:
    check_golden_ir(f"falcon-{size}", "falcon", size)
