"""Checkpoints written by transformers: each weight that the model needs is found, and read as transformers has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compiler.frontend import build
from specs.checkpoint import Checkpoint
from specs.config import resolve_config
from specs.match import match_spec
from specs.weight_map import map_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "head_dim": {"num_key_value_heads": 1, "head_dim": 24},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_is_found_and_read(name: str, dtype: str, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE, **VARIANTS[name])).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size="20KB" if dtype == "float16" else "1GB")
    checkpoint = Checkpoint.open(tmp_path)
    assert (len({info.file for info in checkpoint.tensors.values()}) > 1) == (dtype == "float16")
    spec = match_spec(checkpoint.config)
    config = resolve_config(spec, checkpoint.config, checkpoint.config_where)
    built = build(spec, config)
    assert built.parameters == sum(parameter.numel() for parameter in model.parameters())
    sources = map_weights(spec, config, built.weights, checkpoint)
    state = model.state_dict()
    for source in sources.values():
        assert torch.equal(source.read(), state[source.tensor.name])
        assert source.read().dtype == getattr(torch, dtype)
