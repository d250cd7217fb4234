"""Checkpoints in the layout of TensorRT-LLM's converters, written from a model's own files (tensorrt_llm.py): the same
weights must be read, and the same logits computed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compiler.api import Prepared, float_weights, prepare
from compiler.validate.reference import outputs
from tests.families.harness import REFERENCE, prompts
from tests.families.tensorrt_llm import (
    LLAMA,
    LLAMA_SAYS,
    ROPE,
    SIZES,
    converted,
    model,
    of_encoder,
    staged,
    write,
)
from tests.golden_errors import check_raises

pytest.importorskip("transformers")
GPT: dict[str, Any] = {"vocab_size": 320, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
ENCODER: dict[str, Any] = {**SIZES, "intermediate_size": 96, "max_position_embeddings": 90, "type_vocab_size": 2}


# a vendor's checkpoint, and what the converter's config.json says beside the sizes
CASES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "llama": (
        model("Llama", **LLAMA, rope_theta=5000.0),
        LLAMA_SAYS,
    ),
    "mixtral": (
        model("Mixtral", **LLAMA, num_local_experts=4, rope_theta=5000.0),
        {"architecture": "MixtralForCausalLM", **ROPE, "hidden_act": "swiglu", "rotary_base": 5000.0,
         "moe": {"num_experts": 4, "top_k": 2, "normalization_mode": 1, "tp_mode": 0}, "attn_bias": False},
    ),
    "gpt": (
        model("GPT2", **GPT, tie_word_embeddings=True),
        {"architecture": "GPTForCausalLM", "position_embedding_type": "learned_absolute", "hidden_act": "gelu",
         "bias": True, "gpt_variant": "gpt2", "apply_query_key_layer_scaling": False},
    ),
    "gptj": (
        model("GPTJ", **GPT, rotary_dim=8),
        {"architecture": "GPTJForCausalLM", "position_embedding_type": "rope_gptj", "hidden_act": "gelu",
         "rotary_dim": 8},
    ),
    "gptneox": (
        model("GPTNeoX", **SIZES, intermediate_size=96, rotary_pct=0.25, max_position_embeddings=128),
        {"architecture": "GPTNeoXForCausalLM", **ROPE, "hidden_act": "gelu", "rotary_pct": 0.25,
         "rotary_base": 10000.0},
    ),
    "falcon, one key head": (
        model("Falcon", **SIZES, multi_query=True, parallel_attn=True, bias=False, alibi=False),
        {"architecture": "FalconForCausalLM", **ROPE, "hidden_act": "gelu", "num_key_value_heads": 1, "bias": False,
         "parallel_attention": True, "new_decoder_architecture": False},
    ),
    "falcon, new": (
        model("Falcon", **SIZES, new_decoder_architecture=True, num_kv_heads=2, bias=False, alibi=False),
        {"architecture": "FalconForCausalLM", **ROPE, "hidden_act": "gelu", "num_key_value_heads": 2, "bias": False,
         "parallel_attention": True, "new_decoder_architecture": True},
    ),
    "bloom": (
        model("Bloom", vocab_size=320, hidden_size=64, n_layer=3, n_head=4),
        {"architecture": "BloomForCausalLM", "position_embedding_type": "alibi", "hidden_act": "gelu"},
    ),
    "opt": (
        model("OPT", **SIZES, ffn_dim=96, max_position_embeddings=128, word_embed_proj_dim=64),
        {"architecture": "OPTForCausalLM", "position_embedding_type": "learned_absolute", "hidden_act": "relu",
         "do_layer_norm_before": True},
    ),
    "mpt": (
        model("Mpt", vocab_size=320, d_model=64, n_layers=3, n_heads=4, max_seq_len=128),
        {"architecture": "MPTForCausalLM", "position_embedding_type": "alibi", "hidden_act": "gelu", "bias": False},
    ),
    "baichuan": (
        lambda _: REFERENCE / "baichuan-7b",
        {"architecture": "BaichuanForCausalLM", **ROPE, "hidden_act": "silu", "model_version": "v1_7b"},
    ),
    "chatglm2": (
        lambda _: REFERENCE / "chatglm2-6b",
        {"architecture": "ChatGLMModel", "position_embedding_type": "rope_gptj", "hidden_act": "swiglu",
         "rmsnorm": True, "chatglm_version": "chatglm2", "rotary_pct": 0.5,
         "add_bias_linear": False, "add_qkv_bias": True, "apply_residual_connection_post_layernorm": False},
    ),
    "chatglm": (
        lambda _: REFERENCE / "chatglm-6b",
        {"architecture": "ChatGLMModel", "position_embedding_type": "chatglm", "hidden_act": "gelu", "rmsnorm": False,
         "chatglm_version": "chatglm", "rotary_pct": 0.5, "add_bias_linear": True, "add_qkv_bias": True,
         "bos_token_id": 316, "mask_token_id": 312, "gmask_token_id": 313},   # the vendor's are the spec's
    ),
    "bert": (
        model("Bert", "ForQuestionAnswering", **ENCODER),
        {"architecture": "BertForQuestionAnswering", "position_embedding_type": "learned_absolute",
         "hidden_act": "gelu", "type_vocab_size": 2, "is_roberta": False, "num_labels": 2, "pad_token_id": 0},
    ),
    "bert, no head": (
        model("Bert", "Model", **ENCODER),
        {"architecture": "BertModel", "position_embedding_type": "learned_absolute", "hidden_act": "gelu",
         "type_vocab_size": 2, "is_roberta": False},
    ),
    "roberta": (
        model("Roberta", "ForSequenceClassification", **ENCODER, pad_token_id=1, num_labels=3),
        {"architecture": "RobertaForSequenceClassification", "position_embedding_type": "learned_absolute",
         "hidden_act": "gelu", "type_vocab_size": 2, "is_roberta": True, "pad_token_id": 1, "num_labels": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_same_logits_as_from_the_vendor_s_files(case: str, tmp_path: Path) -> None:
    save, stated = CASES[case]
    theirs = prepare(save(tmp_path / "vendor"), precision="fp32", max_sequence=64)
    config, tensors = converted(theirs, stated, 1 if case == "chatglm" else 2)
    if "is_roberta" in stated:
        tensors = [{of_encoder(name): tensor for name, tensor in rank.items()} for rank in tensors]
    if case == "bert, no head":
        tensors = [
            {name.removeprefix("bert."): tensor for name, tensor in rank.items() if "pooler" not in name}
            for rank in tensors
        ]
    check(prepare(write(tmp_path / "converted", config, tensors), precision="fp32", max_sequence=64), theirs)


@pytest.mark.parametrize(("case", "experts", "stages"), [("llama", 1, 2), ("mixtral", 2, 1), ("mixtral", 4, 3)])
def test_ranks_of_every_kind(case: str, experts: int, stages: int, tmp_path: Path) -> None:
    """More ranks than key heads, a vocabulary that they do not divide, stages, experts apart, context parallelism."""
    _, stated = CASES[case]
    further = {"num_local_experts": 4} if case == "mixtral" else {}
    save = model(case.capitalize(), **{**LLAMA, "vocab_size": 322}, rope_theta=5000.0, **further)
    theirs = prepare(save(tmp_path / "vendor"), precision="fp32", max_sequence=64)
    config, ranks = converted(theirs, stated, 4, experts)
    config["mapping"] = {"world_size": 8 * stages, "tp_size": 4, "pp_size": stages, "cp_size": 2,
                         "moe_tp_size": 4 // experts, "moe_ep_size": experts}  # fmt: skip
    folder = write(tmp_path / "converted", config, staged(ranks, config["num_hidden_layers"], stages))
    found = prepare(folder, precision="fp32", max_sequence=64)
    check(found, theirs)
    read, exact = float_weights(found), float_weights(theirs)
    for decl in theirs.built.weights:
        assert torch.equal(read(decl.name).float(), exact(decl.name).float()), decl.name


def check(found: Prepared, theirs: Prepared) -> None:
    assert found.source.spec.name == theirs.source.spec.name
    rows = [[*row, 313, 316, *row] for row in prompts(300, 5, 9)]
    further = [
        {"prefix": at + 1, "blank": at, "counting": 1, "ordinals": range(1, len(row) + 1)}
        for row in rows
        for at in [row.index(313)]
    ]
    logits, wanted = (outputs(made.built.graph, float_weights(made), rows, further) for made in (found, theirs))
    for one, other in zip(logits, wanted, strict=True):
        # the same float32 weights; the interpreter's graph may differ where a table starts elsewhere
        for name in one:
            torch.testing.assert_close(torch.tensor(one[name]), torch.tensor(other[name]), rtol=1e-5, atol=1e-5)


def test_what_is_not_read(tmp_path: Path) -> None:
    save, stated = CASES["llama"]
    config, ranks = converted(prepare(save(tmp_path / "vendor"), precision="fp32"), stated)
    for name, changes in {
        "CKPT-030-algorithm": {"quantization": {"quant_algo": "W8A8_SQ_PER_CHANNEL"}},
        "CKPT-034-heads": {"mapping": {"world_size": 3, "tp_size": 3}},
        "CKPT-034-ranks": {"mapping": {"world_size": 8, "tp_size": 2}},
        "CKPT-034-expert-ranks": {"mapping": {"world_size": 2, "tp_size": 2, "moe_ep_size": 4}},
        "CKPT-007-rank": {"mapping": {"world_size": 2, "tp_size": 2}},
        "SPEC-047-format": {"architecture": "LlamaForQuestions"},
        "SPEC-042-format": {"position_embedding_type": "alibi"},
    }.items():
        check_raises(name, prepare, write(tmp_path / name, {**config, **changes}, ranks))
    theirs = prepare(tmp_path / "vendor", precision="fp32")
    scaled = [{**rank, "transformer.layers.0.mlp.fc.per_channel_scale": torch.ones(96)} for rank in ranks]
    for name, changes in (("CKPT-030-permuted", {}), ("CKPT-030-gpu", {"made_for": "sm90"})):
        asked = {**config, "quantization": {"quant_algo": "W8A16", **changes}}
        check_raises(name, prepare, write(tmp_path / name, asked, scaled))
    asked = {**config, "quantization": {"quant_algo": "W8A16"}}  # rounded when an engine is built, numbers till then
    assert not prepare(write(tmp_path / "numbers", asked, ranks), precision="fp32").source.checkpoint.low_bit
    config, ranks = converted(theirs, stated, 4)
    ranks[1]["transformer.layers.0.attention.qkv.weight"][16:32] += 1  # the keys of its only key head
    found = prepare(write(tmp_path / "CKPT-034-copies", config, ranks), precision="fp32")
    check_raises("CKPT-034-copies", float_weights(found), "layers.0.attn.k.weight")
    save, stated = CASES["mixtral"]
    config, ranks = converted(prepare(save(tmp_path / "experts"), precision="fp32"), stated)
    for layer in range(3):
        ranks[0][f"transformer.layers.{layer}.mlp.fc.weights_scaling_factor"] = torch.ones(4, 1)
    folder = write(tmp_path / "CKPT-030-experts", {**config, "quantization": {"quant_algo": "FP8"}}, ranks)
    check_raises("CKPT-030-experts", prepare, folder)
