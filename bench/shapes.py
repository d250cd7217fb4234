"""The models that are measured: the demo, and a 1.1B LLaMA shape with random weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# of a weight, without scales and what a recipe leaves alone
BYTES = {"fp32": 4.0, "bf16": 2.0, "w8a16": 1.0, "w8a8_block": 1.0, "w4a16": 0.5, "w4a8": 0.5}


@dataclass(frozen=True)
class Shape:
    """A LLaMA checkpoint to measure, and the work that fits it."""

    name: str
    directory: Path
    prefill: dict[int, int]  # batch -> tokens in each prompt
    context: int  # tokens before the first decode step
    steps: int  # decode steps that are timed

    @property
    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json."""
        config: dict[str, Any] = json.loads((self.directory / "config.json").read_text())
        return config

    def bytes_per_step(self, dtype: str) -> int:
        """Bytes of weights that one decode step must read: all but an embedding that is only looked up."""
        config = self.config
        looked_up = 0 if config["tie_word_embeddings"] else config["vocab_size"] * config["hidden_size"]
        return int(BYTES[dtype] * (sum(math.prod(size) for _, size in tensors(config)) - looked_up))


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of a LLaMA checkpoint."""
    width, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (vocab, width)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (width,)
        yield f"{prefix}.self_attn.q_proj.weight", (queries, width)
        yield f"{prefix}.self_attn.k_proj.weight", (keys, width)
        yield f"{prefix}.self_attn.v_proj.weight", (keys, width)
        yield f"{prefix}.self_attn.o_proj.weight", (width, queries)
        yield f"{prefix}.post_attention_layernorm.weight", (width,)
        yield f"{prefix}.mlp.gate_proj.weight", (ffn, width)
        yield f"{prefix}.mlp.up_proj.weight", (ffn, width)
        yield f"{prefix}.mlp.down_proj.weight", (width, ffn)
    yield "model.norm.weight", (width,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, width)


def demo(_cache: Path) -> Shape:
    """demo/tiny-llama: 5.5M parameters, 512 tokens of context."""
    return Shape("tiny-llama", ROOT / "demo" / "tiny-llama", {1: 384, 8: 128}, context=128, steps=64)


def billion(cache: Path) -> Shape:
    """A 1.1B shape, written to the cache on first use: normal weights (sigma 0.02) in bfloat16, 2.2 GB."""
    directory = cache / "random-1.1b"
    shape = Shape("random-1.1b", directory, {1: 512, 8: 128}, context=128, steps=32)
    if (directory / "config.json").exists():
        return shape
    import torch
    from safetensors.torch import save_file

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, size in tensors(config):
        if len(size) == 1:
            weights[name] = torch.ones(size, dtype=torch.bfloat16)
        else:
            weights[name] = torch.empty(size).normal_(0, 0.02, generator=generator).to(torch.bfloat16)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    # last, so that an interrupted run is made again
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return shape


SHAPES = {"tiny": demo, "1b": billion}
