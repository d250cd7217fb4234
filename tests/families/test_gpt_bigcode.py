"""One key and value head or as many as queries, in one fused tensor; and the same with separate, transposed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.harness import (
    check_case,
    check_decoder,
    check_golden_ir,
    check_transformers,
    logits_of,
    rename_tensors,
    saved,
    write_config,
)

transformers = pytest.importorskip("transformers")

BASE: dict[str, Any] = {"vocab_size": 300, "n_positions": 64, "n_embd": 60, "n_layer": 3, "n_head": 5}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi-query": {},
    "multi-head": {"multi_query": False, "n_head": 3, "n_inner": 100, "activation_function": "gelu"},
    "unscaled": {"scale_attn_weights": False, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    check_transformers("GPTBigCode", tmp_path / "model", {**BASE, **VARIANTS[variant]})


def test_hub_spelling(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = saved("GPTBigCode", folder, BASE)
    rename_tensors(folder, str, **{f"transformer.h.{layer}.attn.bias": torch.ones(64, 64) for layer in range(3)})
    write_config(
        folder, n_inner=240, inference_runner=0, pad_key_length=True, validate_runner_input=True, multi_query=None,
        tie_word_embeddings=None, num_key_value_heads=None,
    )  # fmt: skip
    check_decoder(folder, logits_of(model), 300)


def test_separate_tensors(tmp_path: Path) -> None:
    check_case("santacoder-remote", tmp_path / "bundle")


@pytest.mark.parametrize(("spec", "size"), [("gpt_bigcode", "starcoder"), ("santacoder", "1.1b")])
def test_golden(spec: str, size: str) -> None:
    check_golden_ir(spec, spec, size)
