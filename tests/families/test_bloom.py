"""Linear biases in place of positions, a norm on the embedding, the residual from before or behind the norm."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import compiler
from compiler.frontend.attention import alibi_slopes
from specs.errors import SpecRTError
from tests.families.harness import (
    check_decoder,
    check_golden_ir,
    check_transformers,
    logits_of,
    rename_tensors,
    saved,
    write_config,
)

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "n_layer": 3, "n_head": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "post-norm-residual": {"apply_residual_connection_post_layernorm": True, "hidden_size": 60, "n_head": 3},
    "odd-heads": {"hidden_size": 112, "n_head": 14, "n_layer": 2, "layer_norm_epsilon": 1e-3},
    "untied": {"hidden_size": 60, "n_head": 5, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    check_transformers("Bloom", tmp_path / "model", {**BASE, **VARIANTS[variant]}, lengths=(1, 23, 150))


def test_hub_spelling(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = saved("Bloom", folder, BASE)
    rename_tensors(folder, lambda name: name.removeprefix("transformer."))
    write_config(
        folder, hidden_size=None, n_embed=64, n_head=None, num_attention_heads=4, seq_length=64, pretraining_tp=4,
        tie_word_embeddings=None, attention_softmax_in_fp32=True, offset_alibi=100,
    )  # fmt: skip
    check_decoder(folder, logits_of(model), 300)


def test_slopes() -> None:
    """Those of the reference, for every number of heads."""
    import torch
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for heads in range(1, 130):
        wanted = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)[:, 0, 1].tolist()
        found = alibi_slopes(heads)
        assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(found, wanted, strict=True)), heads


def test_golden() -> None:
    check_golden_ir("bloom", "bloom", "7b1")


def test_cut_products_are_refused(tmp_path: Path) -> None:
    """transformers then leaves two biases out, which training did not; one piece is right."""
    config = transformers.BloomConfig(**{**BASE, "n_layer": 1, "slow_but_exact": True})
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    compiler.prepare(tmp_path)
    write_config(tmp_path, pretraining_tp=2)
    with pytest.raises(SpecRTError, match="slow_but_exact") as caught:
        compiler.prepare(tmp_path)
    assert caught.value.code == "SPEC-047"
