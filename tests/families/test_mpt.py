"""Linear biases of another range, clamped queries, keys and values, norms without biases, a nested config."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from compiler.frontend.attention import alibi_slopes
from tests.families.harness import check_decoder, check_golden_ir, logits_of, save_random, saved, write_config

transformers = pytest.importorskip("transformers")
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor  # noqa: E402

BASE: dict[str, Any] = {"vocab_size": 300, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 256}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd-heads": {"d_model": 96, "n_heads": 12, "n_layers": 2, "layer_norm_epsilon": 1e-3},
    "clipped": {"attn_config": {"clip_qkv": 0.7, "alibi_bias_max": 16}, "n_heads": 3, "d_model": 60},
    "scaled": {"attn_config": {"softmax_scale": 0.3, "alibi_bias_max": 4}, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    config = transformers.MptConfig(**{**BASE, **VARIANTS[variant]})
    model = save_random(transformers.MptForCausalLM(config), tmp_path / "model")
    # transformers never passes alibi_bias_max on; the vendor's own code does
    largest = config.attn_config.alibi_bias_max
    model.transformer.build_mpt_alibi_tensor = partial(build_mpt_alibi_tensor, alibi_bias_max=largest)
    check_decoder(tmp_path / "model", logits_of(model), 300, lengths=(1, 23, 150))


def test_hub_spelling(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = saved("Mpt", folder, BASE)
    attention = {
        "alibi": True, "alibi_bias_max": 8, "attn_impl": "triton", "attn_pdrop": 0, "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False, "clip_qkv": None, "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
    }  # fmt: skip
    write_config(
        folder, attn_config=attention, tokenizer_name="EleutherAI/gpt-neox-20b", verbose=0, init_device="cpu",
        init_config={"name": "kaiming_normal_", "emb_init_std": None}, tie_word_embeddings=None,
    )  # fmt: skip
    check_decoder(folder, logits_of(model), 300)


def test_width_that_its_config_does_not_have(tmp_path: Path) -> None:
    """transformers makes MLPs of four times the width whatever `expansion_ratio` says; the tensors tell."""
    config = transformers.MptConfig(**{**BASE, "n_layers": 1, "expansion_ratio": 2})
    model = save_random(transformers.MptForCausalLM(config), tmp_path / "model")
    check_decoder(tmp_path / "model", logits_of(model), 300, lengths=(1, 9), new=4)


@pytest.mark.parametrize("largest", [8, 16])
def test_slopes(largest: int) -> None:
    """The reference orders them otherwise and comes to the same, for every number of heads."""
    for heads in range(1, 130):
        wanted = -build_mpt_alibi_tensor(heads, 2, largest)[:, 0, 0]
        assert alibi_slopes(heads, largest) == pytest.approx(wanted.tolist(), rel=1e-6), heads


@pytest.mark.parametrize("size", ["7b", "7b-storywriter"])
def test_golden(size: str) -> None:
    check_golden_ir(f"mpt-{size}", "mpt", size)
