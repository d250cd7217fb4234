"""Weights of experts in checkpoints: one tensor for each, one for all, MXFP4 blocks; and what may be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specs.checkpoint import Checkpoint
from specs.schema import load_spec
from specs.weight_map import WeightDecl, WeightSource, map_weights
from tests.golden_errors import check_raises

torch = pytest.importorskip("torch")

EXPERTS, WIDE, NARROW = 3, 32, 4
SPEC = """
schema: 1
name: experts
match: {model_type: experts}
source: {paper: none}
config: {d_model: d_model, d_ffn: d_ffn, n_experts: n_experts}
parts:
  embed: {kind: embedding, rows: 8}
  moe:   {kind: moe, experts: n_experts, top_k: 1, router: {score: softmax}, expert: {kind: gated, act: silu}}
graph:
  - last_hidden_state = moe(embed(tokens))
checkpoint:
  moe.gate: "experts.{e}.gate"
  moe.up: "experts.{e}.up"
  moe.gate_up: {weight: gate_up, mxfp4: gate_up, layout: "n_experts d_ffn [gate, up]", transpose: true}
  moe.down: {weight: "experts.{e}.down.weight | down"}
"""
NEEDED = [
    WeightDecl(f"moe.{leaf}.weight", f"moe.{leaf}", "weight", None, shape, None)
    for leaf, shape in {
        "gate": (EXPERTS, NARROW, WIDE), "up": (EXPERTS, NARROW, WIDE), "down": (EXPERTS, WIDE, NARROW),
    }.items()
]  # fmt: skip
GATE, UP = (torch.randn(EXPERTS, NARROW, WIDE, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
DOWN = torch.randn(EXPERTS, WIDE, NARROW, generator=torch.Generator().manual_seed(3))


def mapped(folder: Path, tensors: dict[str, Any]) -> dict[str, WeightSource]:
    from safetensors.torch import save_file

    (folder / "spec.yaml").write_text(SPEC, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": "experts"}), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    env = {"d_model": WIDE, "d_ffn": NARROW, "n_experts": EXPERTS}
    return map_weights(load_spec(folder / "spec.yaml"), env, NEEDED, Checkpoint.open(folder))


def apart() -> dict[str, Any]:
    leaves = {"gate": GATE, "up": UP, "down": DOWN}
    return {f"experts.{e}.{leaf}.weight": leaves[leaf][e] for leaf in leaves for e in range(EXPERTS)}


def test_one_tensor_for_each_expert(tmp_path: Path) -> None:
    found = mapped(tmp_path, apart())
    for leaf, wanted in {"gate": GATE, "up": UP, "down": DOWN}.items():
        assert torch.equal(found[f"moe.{leaf}.weight"].read(), wanted)


def test_one_tensor_for_all_with_alternating_columns(tmp_path: Path) -> None:
    rows = torch.stack((GATE, UP), 2).reshape(EXPERTS, 2 * NARROW, WIDE)
    found = mapped(tmp_path, {"gate_up": rows.mT, "down": DOWN})
    for leaf, wanted in {"gate": GATE, "up": UP, "down": DOWN}.items():
        assert torch.equal(found[f"moe.{leaf}.weight"].read(), wanted)


def blocks() -> dict[str, Any]:
    """Each byte's halves are the codes b % 16 and b // 16; scales 2^-1, 2^0, ..."""
    codes = torch.arange(EXPERTS * 2 * NARROW * 16).reshape(EXPERTS, 2 * NARROW, 1, 16) * 7 % 256
    scales = torch.arange(EXPERTS * 2 * NARROW).reshape(EXPERTS, 2 * NARROW, 1) + 126
    return {"gate_up_blocks": codes.to(torch.uint8), "gate_up_scales": scales.to(torch.uint8), "down": DOWN}


def test_packed_blocks_by_hand(tmp_path: Path) -> None:
    tensors = blocks()
    found = mapped(tmp_path, tensors)
    got = {leaf: found[f"moe.{leaf}.weight"].read() for leaf in ("gate", "up")}
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for expert in range(EXPERTS):
        for row in range(2 * NARROW):
            scale = 2.0 ** (int(tensors["gate_up_scales"][expert, row, 0]) - 127)
            for column in range(WIDE):
                byte = int(tensors["gate_up_blocks"][expert, row, 0, column // 2])
                code = byte >> 4 if column % 2 else byte & 15
                wanted = values[code % 8] * (-1.0 if code > 7 else 1.0) * scale
                assert float(got["up" if row % 2 else "gate"][expert, row // 2, column]) == wanted


def test_mistakes(tmp_path: Path) -> None:
    lacking = apart()
    del lacking["experts.1.up.weight"]
    check_raises("CKPT-010-expert", mapped, tmp_path, lacking)
    check_raises("CKPT-012-expert", mapped, tmp_path, {**apart(), "experts.2.gate.weight": torch.zeros(5, WIDE)})
    without_scales = blocks()
    scales = without_scales.pop("gate_up_scales")
    check_raises("CKPT-010-scales", mapped, tmp_path, without_scales)
    check_raises("CKPT-012-mxfp4", mapped, tmp_path, {**without_scales, "gate_up_scales": scales[:, 1:]})
    check_raises("CKPT-011-both", mapped, tmp_path, {**apart(), "down": DOWN.clone()})
