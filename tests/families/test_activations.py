"""The activation is read from config.json wherever the reference reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families.harness import check_transformers

pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 70, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
GPT: dict[str, Any] = {"vocab_size": 70, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("Llama", {"hidden_act": "gelu"}),
    ("Mistral", {"hidden_act": "relu"}),
    ("Qwen2", {"hidden_act": "gelu_pytorch_tanh"}),
    ("Qwen3", {"hidden_act": "gelu", "head_dim": 8}),
    ("Gemma", {"hidden_act": "silu", "head_dim": 8}),
    ("Gemma2", {"hidden_activation": "gelu", "head_dim": 8}),
    ("Gemma3", {"hidden_activation": "silu", "head_dim": 8}),
    ("Phi", {"hidden_act": "gelu"}),
    ("Phi3", {"hidden_act": "gelu", "pad_token_id": 0}),
    ("Starcoder2", {"hidden_act": "relu"}),
    ("Glm", {"hidden_act": "gelu", "head_dim": 8, "pad_token_id": 0}),
    ("Glm4", {"hidden_act": "gelu", "head_dim": 8, "pad_token_id": 0}),
    ("Nemotron", {"hidden_act": "silu"}),
    ("GPTBigCode", {**GPT, "activation_function": "tanh"}),
]


@pytest.mark.parametrize(("kind", "config"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_agrees(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    config = config if "n_embd" in config else {**BASE, **config}
    check_transformers(kind, tmp_path / "model", config, text=kind == "Gemma3", lengths=(1, 9), new=4)
