"""Mixtures of experts as the first published one has them: softmax over all, the chosen weights renormalised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families.harness import check_decoder, check_golden_ir, logits_of, save_random, write_config

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
HUB: dict[str, Any] = {"rope_parameters": None, "rope_theta": 1e6}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # config, config.json, saving
    "8 experts, 2 chosen": ({"num_local_experts": 8}, {}, {}),
    "3 experts, hub config": ({"num_local_experts": 3, "num_experts_per_tok": 2}, HUB, {"seed": 12}),
    "1 chosen, window, head_dim": (
        {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 9, "head_dim": 20}, HUB, {},
    ),
    "experts in one tensor, tied": ({"num_local_experts": 5, "num_experts_per_tok": 3, "tie_word_embeddings": True}, {},
                                    {"save_original_format": False}),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    config, written, saving = VARIANTS[variant]
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**BASE, **config))
    reference = save_random(model, tmp_path / "model", **saving)
    write_config(tmp_path / "model", **written)
    check_decoder(tmp_path / "model", logits_of(reference), 288)


def test_golden() -> None:
    check_golden_ir("mixtral", "mixtral", "8x7b")
