"""A planted fault is found at the first value that it touches; without one, nothing is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

import compiler
from compiler.api import compile_with, weights_of
from compiler.validate.trace import Trace, trace
from tests.golden_errors import ROOT, check_raises

DEMO = ROOT / "demo" / "tiny-llama"
SPEC = (ROOT / "specs" / "models" / "llama.yaml").read_text(encoding="utf-8")
TOKENS = list(range(5, 45))


def traced(bundle: Path) -> Trace:
    prepared = compiler.prepare(DEMO)
    return trace(bundle, prepared.graph, weights_of(prepared), TOKENS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_diverges(precision: str, tmp_path: Path) -> None:
    found = traced(compiler.compile(DEMO, precision=precision, out=tmp_path / "b"))
    assert found.first is None
    assert len(found.steps) > 100
    assert found.skipped == 0


# what is planted in the spec that is compiled: (text, its replacement), and the first value that must differ
FAULTS = {
    "rotary base": ("theta: theta, scaling", "theta: theta + 1, scaling", "rope.angle"),
    "gate and up": ("mlp.gate_proj\", mlp.up: \"model.layers.{i}.mlp.up_proj",
                    "mlp.up_proj\", mlp.up: \"model.layers.{i}.mlp.gate_proj", "mlp.gate[0]"),
    "epsilon": ("norm_2: {kind: rms_norm, eps: eps}", "norm_2: {kind: rms_norm, eps: eps * 100}", "norm_2[0]"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_located(fault: str, tmp_path: Path) -> None:
    text, other, value = FAULTS[fault]
    assert text in SPEC
    path = tmp_path / "wrong.yaml"
    path.write_text(SPEC.replace(text, other), encoding="utf-8")
    first = traced(compiler.compile(path, DEMO, out=tmp_path / "b")).first
    assert first is not None
    assert first.value == value
    assert first.place.startswith(str(ROOT / "specs" / "models" / "llama.yaml:"))


def test_a_wrong_scale_of_a_group_is_located(tmp_path: Path) -> None:
    prepared = compiler.prepare(DEMO, precision="w4a16", out=tmp_path / "b")
    right = weights_of(prepared)

    def wrong(name: str) -> torch.Tensor:
        return right(name) * 4 if name == "layers.3.mlp.up.weight.scale" else right(name)

    first = traced(compile_with(prepared, wrong)).first
    assert first is not None
    assert first.value == "mlp.up[3]"


def test_inputs_that_a_prompt_does_not_give(tmp_path: Path) -> None:
    path = tmp_path / "prefix.yaml"
    path.write_text(SPEC.replace("mask: causal", "mask: prefix"), encoding="utf-8")
    bundle = compiler.compile(path, DEMO, out=tmp_path / "b")
    prepared = compiler.prepare(path, DEMO)
    check_raises("VAL-002", trace, bundle, prepared.graph, weights_of(prepared), TOKENS)


def test_a_bundle_for_another_backend(tmp_path: Path) -> None:
    bundle = compiler.compile(DEMO, out=tmp_path / "b")
    text = (bundle / "plan.json").read_text(encoding="utf-8").replace('"openvino"', '"tensorrt"')
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    manifest["files"]["plan.json"] = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (bundle / "plan.json").write_text(text, encoding="utf-8")
    (bundle / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    prepared = compiler.prepare(DEMO)
    check_raises("VAL-001", trace, bundle, prepared.graph, weights_of(prepared), TOKENS)
