"""Local and global layers, each kind with its own rotation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families.harness import (
    check_decoder,
    check_fuses,
    check_golden_ir,
    check_transformers,
    logits_of,
    save_random,
    write_config,
)

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 130, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 96, "sliding_window": 6,
    "query_pre_attn_scalar": 20,
}  # fmt: skip
LOCAL = {"rope_type": "default", "rope_theta": 5000.0}
GLOBAL = {"rope_type": "linear", "rope_theta": 200000.0, "factor": 8.0}
TYPES = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
VARIANTS: dict[str, dict[str, Any]] = {
    "layer-types": {"layer_types": TYPES, "final_logit_softcapping": 8.0,
                    "rope_parameters": {"full_attention": GLOBAL, "sliding_attention": LOCAL}},
    "untied-biases": {"num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": False},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    check_transformers("Gemma3", tmp_path / "model", {**BASE, **VARIANTS[variant]}, text=True, lengths=(1, 6, 7, 41))


def test_agrees_in_the_spelling_of_the_hub(tmp_path: Path) -> None:
    parameters = {"full_attention": GLOBAL, "sliding_attention": LOCAL}
    config = transformers.Gemma3TextConfig(**BASE, sliding_window_pattern=3, rope_parameters=parameters)
    assert config.layer_types == ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    model = save_random(transformers.Gemma3ForCausalLM(config), tmp_path / "model")
    write_config(
        tmp_path / "model", rope_parameters=None, layer_types=None, _sliding_window_pattern=None,
        sliding_window_pattern=3, rope_local_base_freq=5000.0, rope_theta=200000.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0}, cache_implementation="hybrid",
    )  # fmt: skip
    check_decoder(tmp_path / "model", logits_of(model), 130, lengths=(1, 6, 7, 41))


def test_golden() -> None:
    check_golden_ir("gemma3", "gemma3", "1b")
    check_fuses("gemma3", "1b", norms=43, attentions=7, gated=7)
