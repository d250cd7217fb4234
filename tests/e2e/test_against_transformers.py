"""Checkpoints made with transformers -> compile -> run on the CPU, against transformers in float32.

Tolerance 2e-4 absolute on logits: the pass mark of float32 engines in the reference cases that the project's facts
were measured on (their own noise, float32 against float64 and eager against sdpa, is 1e-5).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compiler
import runtime

transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-4
BASE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "head-dim": {"num_key_value_heads": 2, "head_dim": 32},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3-rope": {"rope_parameters": LLAMA3},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rms_norm_eps": 1e-6},
}
FILES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def make(folder: Path, *, dtype: torch.dtype = torch.float32, shard: str | None = None, **config: Any) -> Any:
    """Save a random checkpoint with weights large enough that logits differ clearly; gives the float32 reference."""
    torch.manual_seed(11)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**BASE, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.2 if parameter.ndim > 1 else 0.3
            parameter.normal_(0.0, spread)
            if "norm" in name:
                parameter.add_(1.0)
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def prompts(vocab: int, *lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(5)
    return [generator.integers(0, vocab, length).tolist() for length in lengths]


def reference_logits(model: Any, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def reference_greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    with torch.no_grad():
        ids = torch.tensor([tokens])
        # with a mask: without one, transformers takes prompt ids equal to the padding's for padding
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
    return out[0, len(tokens) :].tolist()


def check(checkpoint: Path, reference: Any, out: Path) -> None:
    """Logits of a ragged batch and 64 greedy ids agree with the reference, row by row."""
    bundle = compiler.compile(checkpoint, out=out)
    model = runtime.load(bundle)
    rows = prompts(reference.config.vocab_size, 1, 40, 7, 96)
    for tokens, logits in zip(rows, model.logits(rows), strict=True):
        np.testing.assert_allclose(logits, reference_logits(reference, tokens), rtol=0, atol=TOLERANCE)
    greedy = model.generate(rows, max_new_tokens=64, stop=())
    assert greedy == [reference_greedy(reference, tokens, 64) for tokens in rows]


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_agree(variant: str, tmp_path: Path) -> None:
    reference = make(tmp_path / "model", **VARIANTS[variant])
    check(tmp_path / "model", reference, tmp_path / "bundle")


@pytest.mark.parametrize("dtype", FILES)
def test_file_types_agree(dtype: str, tmp_path: Path) -> None:
    reference = make(tmp_path / "model", dtype=FILES[dtype], num_key_value_heads=2)
    check(tmp_path / "model", reference, tmp_path / "bundle")


def test_sharded_checkpoint_agrees(tmp_path: Path) -> None:
    reference = make(tmp_path / "model", shard="200KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    check(tmp_path / "model", reference, tmp_path / "bundle")


def test_ragged_batch_equals_each_row_alone(tmp_path: Path) -> None:
    make(tmp_path / "model", num_key_value_heads=2)
    model = runtime.load(compiler.compile(tmp_path / "model", out=tmp_path / "bundle"))
    rows = prompts(BASE["vocab_size"], 3, 64, 17, 33, 1)
    together, alone = model.logits(rows), [model.logits([row])[0] for row in rows]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE)
    generated = model.generate(rows, max_new_tokens=24, stop=())
    assert generated == [model.generate([row], max_new_tokens=24, stop=())[0] for row in rows]
