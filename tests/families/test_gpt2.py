"""Learned positions, fused and transposed weights, and scales that depend on the layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import compiler
from tests.families.harness import (
    check_decoder,
    check_golden_ir,
    logits_of,
    rename_tensors,
    save_random,
    write_config,
)
from tests.golden_errors import ROOT, check_raises

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {"vocab_size": 300, "n_positions": 64, "n_embd": 60, "n_layer": 3, "n_head": 5}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "inner": {"n_inner": 100, "n_head": 3, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
    "relu": {"activation_function": "relu", "tie_word_embeddings": False},
    "scaled-by-layer": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "unscaled": {"scale_attn_weights": False, "activation_function": "gelu_pytorch_tanh"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    config = transformers.GPT2Config(**{**BASE, **VARIANTS[variant]})
    model = save_random(transformers.GPT2LMHeadModel(config), tmp_path / "model", seed=3)
    check_decoder(tmp_path / "model", logits_of(model), 300)


def test_hub_names(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = save_random(transformers.GPT2LMHeadModel(transformers.GPT2Config(**BASE)), folder)
    mask = torch.ones(1, 1, 64, 64)
    buffers = {f"h.{layer}.attn.{name}": mask for layer in range(3) for name in ("bias", "masked_bias")}
    rename_tensors(folder, lambda name: name.removeprefix("transformer."), **buffers)
    write_config(folder, n_ctx=64, tie_word_embeddings=None, scale_attn_weights=None)
    check_decoder(folder, logits_of(model), 300)


def test_longer_than_the_positions_learned() -> None:
    spec = ROOT / "specs" / "models" / "gpt2.yaml"
    check_raises("SPEC-068", compiler.prepare, spec, size="small", max_sequence=1025)


def test_golden() -> None:
    check_golden_ir("gpt2", "gpt2", "small")
