"""Checkpoints in the layout of TensorRT-LLM's converters, written here as its documentation and converters say, from a
model's own files: the same weights must be read, and the same logits computed.
"""

from __future__ import annotations

import json
import re
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
ENCODER: dict[str, Any] = {**SIZES, "intermediate_size": 96, "max_position_embeddings": 90, "type_vocab_size": 2}


def _model(kind: str, head: str = "ForCausalLM", **config: Any) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        made = getattr(transformers, f"{kind}Config")(**config)
        name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}{head}"
        save_random(getattr(transformers, name)(made), folder)
        return folder

    return save


HEADS = {"pooler": "pooler.dense", "hidden": "classifier.dense", "classifier": "classifier.out_proj"}


# a vendor's checkpoint, and what the converter's config.json says beside the sizes
CASES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "llama": (
        _model("Llama", **LLAMA, rope_theta=5000.0),
        {"architecture": "LlamaForCausalLM", **ROPE, "hidden_act": "silu", "rotary_base": 5000.0, "norm_epsilon": 1e-6,
         "rotary_scaling": None, "residual_mlp": False, "attn_bias": False, "mlp_bias": False,
         "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": 1}, "qk_layernorm": False, "head_size": 16,
         "rotary_embedding_dim": 16, "embedding_multiplier": 1.0, "runtime_defaults": None},
    ),
    "mixtral": (
        _model("Mixtral", **LLAMA, num_local_experts=4, rope_theta=5000.0),
        {"architecture": "MixtralForCausalLM", **ROPE, "hidden_act": "swiglu", "rotary_base": 5000.0,
         "moe": {"num_experts": 4, "top_k": 2, "normalization_mode": 1, "tp_mode": 0}, "attn_bias": False},
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
    "chatglm": (
        lambda _: REFERENCE / "chatglm-6b",
        {"architecture": "ChatGLMModel", "position_embedding_type": "chatglm", "hidden_act": "gelu", "rmsnorm": False,
         "chatglm_version": "chatglm", "rotary_pct": 0.5, "add_bias_linear": True, "add_qkv_bias": True,
         "bos_token_id": 316, "mask_token_id": 312, "gmask_token_id": 313},   # the vendor's are the spec's
    ),
    "bert": (
        _model("Bert", "ForQuestionAnswering", **ENCODER),
        {"architecture": "BertForQuestionAnswering", "position_embedding_type": "learned_absolute",
         "hidden_act": "gelu", "type_vocab_size": 2, "is_roberta": False, "num_labels": 2, "pad_token_id": 0},
    ),
    "bert, no head": (
        _model("Bert", "Model", **ENCODER),
        {"architecture": "BertModel", "position_embedding_type": "learned_absolute", "hidden_act": "gelu",
         "type_vocab_size": 2, "is_roberta": False},
    ),
    "roberta": (
        _model("Roberta", "ForSequenceClassification", **ENCODER, pad_token_id=1, num_labels=3),
        {"architecture": "RobertaForSequenceClassification", "position_embedding_type": "learned_absolute",
         "hidden_act": "gelu", "type_vocab_size": 2, "is_roberta": True, "pad_token_id": 1, "num_labels": 3},
    ),
}  # fmt: skip


def converted(
    prepared: Prepared, stated: Mapping[str, Any], ranks: int = 1, expert_parallel: int = 1
) -> tuple[dict[str, Any], list[Tensors]]:
    """config.json and each rank's tensors, as a converter writes them for tensor parallelism."""
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
        put(f"lm_head.{suffix}", padded(ours(f"head.{suffix}"), ranks), 0)
        put(f"transformer.embedding_ln.{suffix}", ours(f"norm_0.{suffix}"))
        for head, module in HEADS.items():
            put(f"{module}.{suffix}", ours(f"{head}.{suffix}"))
        if f"start.{suffix}" in declared:
            put(f"qa_outputs.{suffix}", torch.cat([ours(f"{part}.{suffix}") for part in ("start", "end")]))
    put("transformer.token_embedding.weight", ours("type.weight"))
    put("transformer.position_embedding.weight", ours("place.weight"))
    places = ours("embed_at.weight")
    put("transformer.position_embedding.weight", places[-config["context"] :] if places is not None else None)
    if "head.weight" not in declared and "head" in found.spec.parts:
        put("lm_head.weight", ours("embed.weight"), 0)
    for layer in range(config["layers"]):
        name, mine = f"transformer.layers.{layer}", f"layers.{layer}"
        for suffix in ("weight", "bias"):
            put(f"{name}.input_layernorm.{suffix}", ours(f"{mine}.{norm_1}.{suffix}"))
            put(f"{name}.{second}.{suffix}", ours(f"{mine}.norm_2.{suffix}"))
            qkv = [ours(f"{mine}.{attn}.{part}.{suffix}") for part in "qkv"]
            if stated.get("chatglm_version") == "chatglm":  # head by head
                by_head = torch.stack([part.unflatten(0, (config["heads"], -1)) for part in qkv if part is not None], 1)
                put(f"{name}.attention.qkv.{suffix}", by_head.flatten(0, 2))
            elif all(part is not None for part in qkv):
                heads = (config["heads"], config["kv_heads"], config["kv_heads"])
                cut = [
                    part.unflatten(0, (count, -1))
                    .repeat_interleave(max(1, ranks // count), 0)
                    .flatten(0, 1)
                    .chunk(ranks)
                    for part, count in zip(qkv, heads, strict=True)
                    if part is not None
                ]
                put(f"{name}.attention.qkv.{suffix}", torch.cat([piece[r] for r in range(ranks) for piece in cut]), 0)
            put(
                f"{name}.attention.dense.{suffix}", ours(f"{mine}.{attn}.o.{suffix}"), 1 if suffix == "weight" else None
            )
            put(f"{name}.mlp.proj.{suffix}", ours(f"{mine}.mlp.down.{suffix}"), 1 if suffix == "weight" else None)
            if f"{mine}.moe.router.{suffix}" in declared:
                gate, up, down, router = (
                    ours(f"{mine}.moe.{part}.{suffix}") for part in ("gate", "up", "down", "router")
                )
                put(f"{name}.mlp.router.{suffix}", router)
                parts = ranks // expert_parallel
                for rank, tensors in enumerate(out):
                    at = slice(
                        rank % expert_parallel * len(gate) // expert_parallel,
                        (rank % expert_parallel + 1) * len(gate) // expert_parallel,
                    )
                    u, g = (x[at].chunk(parts, 1)[rank // expert_parallel] for x in (up, gate))
                    tensors[f"{name}.mlp.fc.weight"] = torch.cat([u, g], 1)
                    tensors[f"{name}.mlp.proj.weight"] = down[at].chunk(parts, 2)[rank // expert_parallel].clone()
                continue
            up, gate = ours(f"{mine}.mlp.up.{suffix}"), ours(f"{mine}.mlp.gate.{suffix}")
            if stated.get("hidden_act") == "swiglu" and up is not None and gate is not None:
                both = [torch.cat([u, g]) for u, g in zip(up.chunk(ranks), gate.chunk(ranks), strict=True)]
                put(f"{name}.mlp.fc.{suffix}", torch.cat(both), 0)
            elif isinstance(found.spec.parts.get("mlp"), GatedMlp):
                put(f"{name}.mlp.fc.{suffix}", gate, 0)
                put(f"{name}.mlp.gate.{suffix}", up, 0)
            else:
                put(f"{name}.mlp.fc.{suffix}", up, 0)
    told = {
        "dtype": "float32", "logits_dtype": "float32", "vocab_size": config["vocab"], "hidden_size": config["d_model"],
        "num_hidden_layers": config["layers"], "num_attention_heads": config["heads"],
        "num_key_value_heads": config["kv_heads"], "intermediate_size": config["d_ffn"],
        "max_position_embeddings": config.get("places", config["context"]), "norm_epsilon": config.get("eps", 1e-5),
        "use_parallel_embedding": False, "embedding_sharding_dim": 0, "share_embedding_table": False,
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        "mapping": {"world_size": ranks, "tp_size": ranks, "pp_size": 1}, **stated,
    }  # fmt: skip
    return told, out


def padded(rows: torch.Tensor | None, ranks: int) -> torch.Tensor | None:
    """A vocabulary's rows, a multiple of the ranks."""
    return None if rows is None else torch.cat([rows, rows.new_zeros(-len(rows) % ranks, *rows.shape[1:])])


def staged(ranks: list[Tensors], layers: int, stages: int) -> list[Tensors]:
    """The same for pipeline stages: each counts its layers from 0, the first ones have one more."""
    found = []
    for stage, own in enumerate(torch.arange(layers).tensor_split(stages)):
        for rank in ranks:
            tensors = {}
            for name, tensor in rank.items():
                match = re.match(r"transformer\.layers\.(\d+)\.(.*)", name)
                if match and int(match[1]) in own:
                    tensors[f"transformer.layers.{int(match[1]) - int(own[0])}.{match[2]}"] = tensor
                elif not match and (stage == 0 if "embedding" in name else stage == stages - 1):
                    tensors[name] = tensor
            found.append(tensors)
    return found


def of_encoder(name: str) -> str:
    """A module's name in a model that has an encoder."""
    name = re.sub(r"^transformer\.layers", "bert.layers", name)
    return re.sub(r"^transformer", "bert.embedding", name)


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
    save = _model(case.capitalize(), **{**LLAMA, "vocab_size": 322}, rope_theta=5000.0, **further)
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
        "CKPT-034-heads": {"mapping": {"world_size": 3, "tp_size": 3}},
        "CKPT-034-ranks": {"mapping": {"world_size": 8, "tp_size": 2}},
        "CKPT-007-rank": {"mapping": {"world_size": 2, "tp_size": 2}},
        "SPEC-047-format": {"architecture": "LlamaForQuestions"},
        "SPEC-042-format": {"position_embedding_type": "alibi"},
    }.items():
        check_raises(name, prepare, write(tmp_path / name, {**config, **changes}, ranks))
    theirs = prepare(tmp_path / "vendor", precision="fp32")
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
