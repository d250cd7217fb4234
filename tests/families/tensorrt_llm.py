"""Writes a model in the layout of TensorRT-LLM's converters, as its documentation and converters say: for ranks of
tensor and expert parallelism, and for pipeline stages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compiler.api import Prepared, float_weights
from specs.parts import GatedMlp
from tests.families.harness import save_random

Tensors = dict[str, torch.Tensor]
SIZES: dict[str, Any] = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
ROPE = {"position_embedding_type": "rope_gpt_neox"}
LLAMA: dict[str, Any] = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 128}


def model(kind: str, head: str = "ForCausalLM", **config: Any) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        import transformers

        made = getattr(transformers, f"{kind}Config")(**config)
        name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}{head}"
        save_random(getattr(transformers, name)(made), folder)
        return folder

    return save


HEADS = {"pooler": "pooler.dense", "hidden": "classifier.dense", "classifier": "classifier.out_proj"}
LLAMA_SAYS: dict[str, Any] = {  # what its config.json says beside sizes
    "architecture": "LlamaForCausalLM", **ROPE, "hidden_act": "silu", "rotary_base": 5000.0, "norm_epsilon": 1e-6,
    "rotary_scaling": None, "residual_mlp": False, "attn_bias": False, "mlp_bias": False,
    "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": 1}, "qk_layernorm": False, "head_size": 16,
    "rotary_embedding_dim": 16, "embedding_multiplier": 1.0, "runtime_defaults": None,
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
