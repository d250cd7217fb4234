"""The family that the other tests of the pipeline use, judged like all families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import compiler
from tests.families.harness import (
    check_decoder,
    check_fuses,
    check_golden_ir,
    check_transformers,
    logits_of,
    rename_tensors,
    save_random,
)
from tests.golden_errors import check_raises

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 150, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96,
}  # fmt: skip
# Rows of 1, 16 and 17 tokens stay within the original context or reach just beyond it, 41 starts far beyond.
SCALINGS: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-mscale": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "mscale": 0.8,
                    "mscale_all_dim": 0.5, "beta_fast": 16, "beta_slow": 2},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.4, 1.6, 2.0],
                 "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 8.0], "factor": 6.0, "original_max_position_embeddings": 33},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("hub", [True, False])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_rotations_agree(scaling: str, hub: bool, tmp_path: Path) -> None:
    config = {**BASE, "rope_parameters": {"rope_theta": 10000.0, **SCALINGS[scaling]}}
    check_transformers("Llama", tmp_path / "model", config, {} if hub else None, lengths=(1, 16, 17, 41))


def test_dynamic_scaling_beyond_the_context_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**BASE, rope_parameters={"rope_theta": 10000.0, **SCALINGS["dynamic"]})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    check_raises("SPEC-056", compiler.prepare, tmp_path, max_sequence=97)


def test_agrees(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, max_position_embeddings=256,
    )  # fmt: skip
    model = save_random(transformers.LlamaForCausalLM(config), tmp_path / "model")
    check_decoder(tmp_path / "model", logits_of(model), 320)


def test_a_tied_head_that_differs_is_refused(tmp_path: Path) -> None:
    """transformers 5 then does not tie, 4 did and left the head out."""
    folder = tmp_path / "model"
    config = transformers.LlamaConfig(**BASE, tie_word_embeddings=True)
    model = save_random(transformers.LlamaForCausalLM(config), folder)
    embedding = model.model.embed_tokens.weight.detach()
    rename_tensors(folder, str, **{"lm_head.weight": embedding})
    check_decoder(folder, logits_of(model), 150, lengths=(1, 9), new=4)
    rename_tensors(folder, str, **{"lm_head.weight": embedding * 2})
    check_raises("CKPT-019", compiler.compile, folder, out=tmp_path / "bundle")


def test_golden() -> None:
    check_golden_ir("llama", "llama", "8b")
    check_fuses("llama", "3.2-1b", norms=3, attentions=1, gated=1)
