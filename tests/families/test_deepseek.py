"""Latent attention with fine-grained experts: softmax and greedy groups, sigmoid with a correction of the choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.harness import check_decoder, check_golden_ir, logits_of, save_random, write_config

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 48, "intermediate_size": 56, "moe_intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 20, "rms_norm_eps": 1e-5,
}  # fmt: skip
YARN: dict[str, Any] = {
    "type": "yarn", "factor": 8.0, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.9,
    "original_max_position_embeddings": 32,
}  # fmt: skip
HUB: dict[str, Any] = {
    "rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": YARN, "head_dim": None, "qk_head_dim": None,
    "moe_layer_freq": 1, "ep_size": 1, "aux_loss_alpha": 0.001, "seq_aux": True,
}  # fmt: skip
GREEDY_GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7}
Variant = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]  # config, config.json, saving
SOFTMAX: dict[str, Variant] = {
    "greedy, no query latent": ({"q_lora_rank": None}, {}, {}),
    "groups, yarn, hub config": (
        {**GREEDY_GROUPS, "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 10000.0}},
        {**HUB, "scoring_func": "softmax"}, {},
    ),
    "biases, value heads narrower, one tensor": (
        {"attention_bias": True, "mlp_bias": True, "v_head_dim": 6, "n_shared_experts": 1, "first_k_dense_replace": 0},
        {}, {"save_original_format": False},
    ),
}  # fmt: skip
SIGMOID: dict[str, Variant] = {
    "groups of 2": ({"n_group": 4, "topk_group": 2}, {}, {}),
    "yarn, hub config": (
        {"n_group": 2, "topk_group": 1, "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 10000.0}},
        {**HUB, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}, {},
    ),
    "one group, not renormalised, halves, no query latent": (
        {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False, "q_lora_rank": None,
         "attention_bias": True, "num_key_value_heads": None},
        {}, {"save_original_format": False},
    ),
    "more rows than experts": (  # the shape whose logits were wrong with an `If` between two forms (decision 20)
        {"num_hidden_layers": 4, "first_k_dense_replace": 3, "hidden_size": 16, "n_routed_experts": 6,
         "num_experts_per_tok": 2, "n_group": 3, "topk_group": 3},
        {}, {},
    ),
}  # fmt: skip


def check(kind: str, variant: Variant, folder: Path) -> None:
    config, written, saving = variant
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**{**BASE, **config}))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # of the size of the scores' differences
            buffer.copy_(torch.linspace(-0.3, 0.3, len(buffer))[torch.randperm(len(buffer))])
    reference = save_random(model, folder, **saving)
    write_config(folder, **written)
    check_decoder(folder, logits_of(reference), 288)


@pytest.mark.parametrize("variant", SOFTMAX)
def test_softmax_routing(variant: str, tmp_path: Path) -> None:
    check("DeepseekV2", SOFTMAX[variant], tmp_path / "model")


@pytest.mark.parametrize("variant", SIGMOID)
def test_sigmoid_routing(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    check("DeepseekV3", SIGMOID[variant], tmp_path / "model")


@pytest.mark.parametrize(("spec", "size"), [("deepseek_v2", "236b"), ("deepseek_v3", "671b")])
def test_golden(spec: str, size: str) -> None:
    check_golden_ir(spec, spec, size)
