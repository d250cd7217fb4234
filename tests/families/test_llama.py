"""The family that the other tests of the pipeline use, judged like all families."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.harness import check_decoder, check_golden_ir, logits_of, save_random

transformers = pytest.importorskip("transformers")


def test_agrees(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, max_position_embeddings=256,
    )  # fmt: skip
    model = save_random(transformers.LlamaForCausalLM(config), tmp_path / "model")
    check_decoder(tmp_path / "model", logits_of(model), 320)


def test_golden() -> None:
    check_golden_ir("llama", "llama", "8b")
