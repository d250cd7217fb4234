"""Checkpoints in the layout of TensorRT-LLM's converters, written here as its documentation and converters say, from a
model's own files: the same weights must be read, and the same logits computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compiler.api import Prepared, float_weights, prepare, weights_of
from compiler.ir.formats import round_to
from compiler.validate.reference import outputs
from specs.parts import GatedMlp
from tests.families.harness import REFERENCE, prompts, save_random
from tests.golden_errors import check_raises

transformers = pytest.importorskip("transformers")
Tensors = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GPT: dict[str, Any] = {"vocab_size": 320, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
ROPE = {"position_embedding_type": "rope_gpt_neox"}
LLAMA: dict[str, Any] = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 128}


def _model(kind: str, **config: Any) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        made = getattr(transformers, f"{kind}Config")(**config)
        name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
        save_random(getattr(transformers, name)(made), folder)
        return folder

    return save


# a vendor's checkpoint, and what the converter's config.json says beside the sizes
CASES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "llama": (
        _model("Llama", **LLAMA, rope_theta=5000.0),
        {"architecture": "LlamaForCausalLM", **ROPE, "hidden_act": "silu", "rotary_base": 5000.0, "norm_epsilon": 1e-6,
         "rotary_scaling": None, "residual_mlp": False, "attn_bias": False, "mlp_bias": False,
         "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": 1}, "qk_layernorm": False},
    ),
    "gpt": (
        _model("GPT2", **GPT, tie_word_embeddings=True),
        {"architecture": "GPTForCausalLM", "position_embedding_type": "learned_absolute", "hidden_act": "gelu",
         "bias": True, "gpt_variant": "gpt2", "apply_query_key_layer_scaling": False},
    ),
    "gptj": (
        _model("GPTJ", **GPT, rotary_dim=8),
        {"architecture": "GPTJForCausalLM", "position_embedding_type": "rope_gptj", "hidden_act": "gelu",
         "rotary_dim": 8},
    ),
    "gptneox": (
        _model("GPTNeoX", **SIZES, intermediate_size=96, rotary_pct=0.25, max_position_embeddings=128),
        {"architecture": "GPTNeoXForCausalLM", **ROPE, "hidden_act": "gelu", "rotary_pct": 0.25,
         "rotary_base": 10000.0},
    ),
    "falcon, one key head": (
        _model("Falcon", **SIZES, multi_query=True, parallel_attn=True, bias=False, alibi=False),
        {"architecture": "FalconForCausalLM", **ROPE, "hidden_act": "gelu", "num_key_value_heads": 1, "bias": False,
         "parallel_attention": True, "new_decoder_architecture": False},
    ),
    "falcon, new": (
        _model("Falcon", **SIZES, new_decoder_architecture=True, num_kv_heads=2, bias=False, alibi=False),
        {"architecture": "FalconForCausalLM", **ROPE, "hidden_act": "gelu", "num_key_value_heads": 2, "bias": False,
         "parallel_attention": True, "new_decoder_architecture": True},
    ),
    "bloom": (
        _model("Bloom", vocab_size=320, hidden_size=64, n_layer=3, n_head=4),
        {"architecture": "BloomForCausalLM", "position_embedding_type": "alibi", "hidden_act": "gelu"},
    ),
    "opt": (
        _model("OPT", **SIZES, ffn_dim=96, max_position_embeddings=128, word_embed_proj_dim=64),
        {"architecture": "OPTForCausalLM", "position_embedding_type": "learned_absolute", "hidden_act": "relu",
         "do_layer_norm_before": True},
    ),
    "mpt": (
        _model("Mpt", vocab_size=320, d_model=64, n_layers=3, n_heads=4, max_seq_len=128),
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
}  # fmt: skip


def converted(prepared: Prepared, stated: Mapping[str, Any], ranks: int = 1) -> tuple[dict[str, Any], list[Tensors]]:
    """config.json and each rank's tensors, as a converter writes them."""
    found, weights = prepared.source, float_weights(prepared)
    declared = {decl.name: decl for decl in prepared.built.weights}
    config = found.config
    leaf = {name.split(".", 2)[2] if decl.layer is not None else name for name, decl in declared.items()}
    norm_1 = "norm" if "norm.weight" in leaf else "norm_1"
    attn = next(name.split(".")[0] for name in sorted(leaf) if name.endswith(".o.weight"))
    second = "mlp_layernorm" if stated.get("new_decoder_architecture") else "post_layernorm"
    out: list[Tensors] = [{} for _ in range(ranks)]

    def put(name: str, tensor: torch.Tensor | None, axis: int | None = None) -> None:
        if tensor is not None:
            pieces = [tensor] * ranks if axis is None else tensor.chunk(ranks, axis)
            for rank, piece in zip(out, pieces, strict=True):
                rank[name] = piece.clone()

    def ours(name: str) -> torch.Tensor | None:
        return weights(name).float() if name in declared else None

    for suffix in ("weight", "bias"):
        put(f"transformer.vocab_embedding.{suffix}", ours(f"embed.{suffix}"))
        put(f"transformer.ln_embed.{suffix}", ours(f"norm_in.{suffix}"))
        put(f"transformer.ln_f.{suffix}", ours(f"norm_f.{suffix}"))
        put(f"lm_head.{suffix}", ours(f"head.{suffix}"), 0)
    places = ours("embed_at.weight")
    put("transformer.position_embedding.weight", places[-config["context"] :] if places is not None else None)
    if "head.weight" not in declared:
        put("lm_head.weight", ours("embed.weight"), 0)
    for layer in range(config["layers"]):
        name, mine = f"transformer.layers.{layer}", f"layers.{layer}"
        for suffix in ("weight", "bias"):
            put(f"{name}.input_layernorm.{suffix}", ours(f"{mine}.{norm_1}.{suffix}"))
            put(f"{name}.{second}.{suffix}", ours(f"{mine}.norm_2.{suffix}"))
            qkv = [ours(f"{mine}.{attn}.{part}.{suffix}") for part in "qkv"]
            if all(part is not None for part in qkv):
                cut = [part.chunk(ranks, 0) for part in qkv if part is not None]
                put(f"{name}.attention.qkv.{suffix}", torch.cat([piece[r] for r in range(ranks) for piece in cut]), 0)
            put(
                f"{name}.attention.dense.{suffix}", ours(f"{mine}.{attn}.o.{suffix}"), 1 if suffix == "weight" else None
            )
            put(f"{name}.mlp.proj.{suffix}", ours(f"{mine}.mlp.down.{suffix}"), 1 if suffix == "weight" else None)
            up, gate = ours(f"{mine}.mlp.up.{suffix}"), ours(f"{mine}.mlp.gate.{suffix}")
            if stated.get("hidden_act") == "swiglu" and up is not None and gate is not None:
                both = [torch.cat([u, g]) for u, g in zip(up.chunk(ranks), gate.chunk(ranks), strict=True)]
                put(f"{name}.mlp.fc.{suffix}", torch.cat(both), 0)
            elif isinstance(found.spec.parts["mlp"], GatedMlp):
                put(f"{name}.mlp.fc.{suffix}", gate, 0)
                put(f"{name}.mlp.gate.{suffix}", up, 0)
            else:
                put(f"{name}.mlp.fc.{suffix}", up, 0)
    told = {
        "dtype": "float32", "logits_dtype": "float32", "vocab_size": config["vocab"], "hidden_size": config["d_model"],
        "num_hidden_layers": config["layers"], "num_attention_heads": config["heads"],
        "num_key_value_heads": config["kv_heads"], "intermediate_size": config["d_ffn"],
        "max_position_embeddings": config["context"], "norm_epsilon": config.get("eps", 1e-5),
        "use_parallel_embedding": False, "embedding_sharding_dim": 0, "share_embedding_table": False,
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        "mapping": {"world_size": ranks, "tp_size": ranks, "pp_size": 1}, **stated,
    }  # fmt: skip
    return told, out


def write(folder: Path, config: dict[str, Any], ranks: list[Tensors]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for number, tensors in enumerate(ranks):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"rank{number}.safetensors")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_the_same_logits_as_from_the_vendor_s_files(case: str, tmp_path: Path) -> None:
    save, stated = CASES[case]
    theirs = prepare(save(tmp_path / "vendor"), precision="fp32", max_sequence=64)
    ranks = 1 if "one key head" in case else 2
    found = prepare(write(tmp_path / "converted", *converted(theirs, stated, ranks)), precision="fp32", max_sequence=64)
    assert found.source.spec.name == theirs.source.spec.name
    rows = prompts(300, 5, 9)
    logits, wanted = (outputs(made.built.graph, float_weights(made), rows) for made in (found, theirs))
    for one, other in zip(logits, wanted, strict=True):
        # the same float32 weights; the interpreter's graph may differ where a table starts elsewhere
        torch.testing.assert_close(torch.tensor(one["logits"]), torch.tensor(other["logits"]), rtol=1e-5, atol=1e-5)


def quantized(tensors: Tensors, make: Callable[[torch.Tensor], Tensors]) -> Tensors:
    """A rank's tensors with the layers' linears in a low-bit layout."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if part == "weight" and module.endswith((".qkv", ".dense", ".fc", ".gate", ".proj")):
            out |= {f"{module}.{key}": value for key, value in make(tensor).items()}
        else:
            out[name] = tensor
    return out


def float8(weight: torch.Tensor) -> Tensors:
    scale = torch.tensor([0.01])
    return {
        "weight": round_to(weight / scale, "f8e4m3"), "weights_scaling_factor": scale,
        "activation_scaling_factor": torch.ones(1),
    }  # fmt: skip


def halves(weight: torch.Tensor) -> Tensors:
    """AWQ as ModelOpt packs it: two outputs in a byte, factors for the inputs."""
    factors = torch.linspace(0.5, 1.5, weight.shape[1])
    split = (weight / factors).unflatten(1, (-1, 16))
    scale = split.abs().amax(-1) / 7
    codes = (split / scale[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int8)
    packed = (codes[0::2] & 15) | (codes[1::2] << 4)
    return {"weight": packed, "weights_scaling_factor": scale, "prequant_scaling_factor": factors}


def test_low_bit_weights_of_two_ranks(tmp_path: Path) -> None:
    save, stated = CASES["llama"]
    theirs = prepare(save(tmp_path / "vendor"), precision="fp32", max_sequence=64)
    exact = float_weights(theirs)
    for algorithm, make, bound in (("FP8", float8, 0.06), ("W4A16_AWQ", halves, 0.2)):
        config, ranks = converted(theirs, {**stated, "quantization": {"quant_algo": algorithm}}, 2)
        made = [quantized(rank, make) for rank in ranks]
        found = prepare(write(tmp_path / algorithm, config, made), max_sequence=64)
        read = float_weights(found)
        for name in (
            "layers.1.attn.q.weight",
            "layers.2.attn.v.weight",
            "layers.0.mlp.gate.weight",
            "layers.2.mlp.down.weight",
        ):
            wanted = exact(name)
            assert float((read(name) - wanted).norm() / wanted.norm()) < bound, (algorithm, name)
        if algorithm == "FP8":  # codes are kept: a step is exact
            assert found.precision.recipe.name == "checkpoint"
            codes = weights_of(found)("layers.2.attn.v.weight.codes")
            assert torch.equal(codes.float() * 0.01, read("layers.2.attn.v.weight"))


def test_what_is_not_read(tmp_path: Path) -> None:
    save, stated = CASES["llama"]
    config, ranks = converted(prepare(save(tmp_path / "vendor"), precision="fp32"), stated)
    for name, changes in {
        "CKPT-030-permuted": {"quantization": {"quant_algo": "W8A16"}},
        "CKPT-034-heads": {"mapping": {"world_size": 4, "tp_size": 4}},
        "CKPT-034-ranks": {"mapping": {"world_size": 8, "tp_size": 2}},
        "CKPT-007-rank": {"mapping": {"world_size": 2, "tp_size": 2}},
        "SPEC-047-format": {"architecture": "LlamaForQuestions"},
        "SPEC-042-format": {"position_embedding_type": "alibi"},
    }.items():
        check_raises(name, prepare, write(tmp_path / name, {**config, **changes}, ranks))
