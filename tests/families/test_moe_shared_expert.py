"""Fine-grained experts beside dense layers: with a gated shared expert, and without one but with normed heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families.harness import check_decoder, check_golden_ir, logits_of, save_random, write_config

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 48, "intermediate_size": 56, "moe_intermediate_size": 20, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "num_experts": 5,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 36,
}  # fmt: skip
HUB: dict[str, Any] = {"rope_parameters": None, "rope_theta": 10000.0, "layer_types": None, "max_window_layers": 3}
Variant = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]  # config, config.json, saving
SHARED: dict[str, Variant] = {
    "all sparse": ({}, {}, {}),
    "every second, renormalised, hub config": (
        {"decoder_sparse_step": 2, "norm_topk_prob": True, "max_window_layers": 3}, HUB, {},
    ),
    "some dense, window, no biases": (
        {"mlp_only_layers": [0, 2], "use_sliding_window": True, "sliding_window": 7, "qkv_bias": False,
         "max_window_layers": 3},
        {}, {},
    ),
    "window, hub config": (
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}, HUB, {},
    ),
    "experts in one tensor, tied": (
        {"num_experts": 3, "num_experts_per_tok": 3, "tie_word_embeddings": True}, {}, {"save_original_format": False},
    ),
}  # fmt: skip
NORMED: dict[str, Variant] = {
    "published": (
        {"norm_topk_prob": True, "head_dim": 16}, {**HUB, "num_local_experts": None, "num_experts": 5}, {"seed": 12},
    ),
    "biases, some dense": ({"attention_bias": True, "mlp_only_layers": [1], "decoder_sparse_step": 2}, {}, {}),
    "window, one tensor": (
        {"use_sliding_window": True, "sliding_window": 6, "num_experts_per_tok": 1}, {},
        {"save_original_format": False},
    ),
}  # fmt: skip


def check(kind: str, variant: Variant, folder: Path) -> None:
    config, written, saving = variant
    base = BASE if kind == "Qwen2Moe" else {k: v for k, v in BASE.items() if not k.startswith("shared")}
    made = getattr(transformers, f"{kind}Config")(**{**base, **config})
    reference = save_random(getattr(transformers, f"{kind}ForCausalLM")(made), folder, **saving)
    write_config(folder, **written)
    check_decoder(folder, logits_of(reference), 288)


@pytest.mark.parametrize("variant", SHARED)
def test_with_a_shared_expert(variant: str, tmp_path: Path) -> None:
    check("Qwen2Moe", SHARED[variant], tmp_path / "model")


@pytest.mark.parametrize("variant", NORMED)
def test_with_normed_heads(variant: str, tmp_path: Path) -> None:
    check("Qwen3Moe", NORMED[variant], tmp_path / "model")


@pytest.mark.parametrize(("spec", "size"), [("qwen2_moe", "a2.7b"), ("qwen3_moe", "30b-a3b")])
def test_golden(spec: str, size: str) -> None:
    check_golden_ir(spec, spec, size)
