"""Attention sinks, alternating windows, clamped experts with biases, MXFP4 files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compiler.api import prepare
from compiler.plan import plan_of
from tests.families.harness import check_decoder, check_golden_ir, logits_of, saved, write_config

transformers = pytest.importorskip("transformers")

YARN: dict[str, Any] = {
    "rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 32,
}  # fmt: skip
BASE: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "max_position_embeddings": 256, "num_local_experts": 5,
    "num_experts_per_tok": 2, "sliding_window": 8, "rope_parameters": {**YARN, "rope_theta": 150000.0},
}  # fmt: skip
HUB: dict[str, Any] = {
    "rope_parameters": None, "rope_theta": 150000.0, "rope_scaling": YARN, "experts_per_token": 2,
    "initial_context_length": 32, "swiglu_alpha": None,
}  # fmt: skip
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "published": ({}, HUB),
    "limit, alpha, kinds of layers": (
        {"swiglu_limit": 0.4, "swiglu_alpha": 1.3,
         "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        {},
    ),
    "3 experts, 1 chosen, one key head, no attention biases": (
        {"num_local_experts": 3, "num_experts_per_tok": 1, "num_key_value_heads": 1, "attention_bias": False,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"layer_types": None},
    ),
}  # fmt: skip


def make(folder: Path, **config: Any) -> Any:
    return saved("GptOss", folder, {**BASE, **config})


@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees(variant: str, tmp_path: Path) -> None:
    config, written = VARIANTS[variant]
    reference = make(tmp_path / "model", **config)
    write_config(tmp_path / "model", **written)
    check_decoder(tmp_path / "model", logits_of(reference), 288)


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest MXFP4 of [E, out, in], and random scales in place of the best: blocks [E, out, in/32, 16], scales."""
    experts, out, width = weight.shape
    scales = torch.randint(118, 126, (experts, out, width // 32), generator=torch.Generator().manual_seed(3))
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    scaled = weight.reshape(experts, out, -1, 32) / 2.0 ** (scales[..., None] - 127)
    codes = (scaled.abs()[..., None] - table).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8), scales.to(torch.uint8)


def test_mxfp4_files_are_decoded_as_transformers_does(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = tmp_path / "model"
    make(folder)
    tensors = load_file(folder / "model.safetensors")
    packed = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        blocks, scales = pack(packed.pop(name).mT)
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).float().contiguous()
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    reference = transformers.GptOssForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    write_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    check_decoder(folder, logits_of(reference), 288)
    gpu = prepare(folder, target="sm90", toolchain="tensorrt-8.6")
    for plan in (
        prepare(folder).precision.plan,
        gpu.precision.plan,
    ):  # the experts' codes are in the bundle as they are
        assert plan is not None
        assert {linear.storage.type for linear in plan.linears.values()} == {"f4e2m1"}
        assert len(plan.linears) == 9
    stored = {item["layout"] for name, item in plan_of(gpu)["weights"].items() if name.endswith(".codes")}
    assert stored == {"words"}  # which kernels of experts read, and no engine


def test_golden() -> None:
    check_golden_ir("gpt_oss", "gpt_oss", "20b")
