"""Mistakes that only show when a spec is built with the values of a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

import compiler
from tests.golden_errors import ROOT, check_raises

SPEC = (ROOT / "specs" / "models" / "llama.yaml").read_text(encoding="utf-8")

# golden name: (text in the spec, what replaces it)
EDITS = {
    "SPEC-061": ("- x = embed(tokens)", "- y = 2.0\n  - x = embed(tokens) * y"),
    "SPEC-062": (
        "- x = x + mlp(norm_2(x))\n  - logits = head(norm_f(x))",
        "- x = x + norm_2(x)\n  - x = head(norm_f(x))\n  - repeat layers:\n      - logits = mlp(x)",
    ),
    "SPEC-069": (
        "{kind: gated_mlp, act: activation, bias: mlp_bias}",
        "{kind: moe, experts: 8, top_k: 2, router: {score: sigmoid, groups: 3, top_groups: 2}, "
        "expert: {kind: gated, act: activation}, bias: mlp_bias}",
    ),
    "SPEC-064": ("parameters: 5_475_584", "parameters: 5_475_585"),
}
DEPLOYMENTS = {
    "SPEC-065": "deployment: 2\nmodel: llama.yaml\n",
    "SPEC-065-nothing": "deployment: 1\nprecision: fp32\n",
}


@pytest.mark.parametrize("golden", EDITS)
def test_mistakes_that_a_build_finds(golden: str, tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(SPEC.replace(*EDITS[golden]), encoding="utf-8")
    check_raises(golden, compiler.prepare, path, size="demo")


@pytest.mark.parametrize("golden", DEPLOYMENTS)
def test_mistakes_in_a_deployment(golden: str, tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(DEPLOYMENTS[golden], encoding="utf-8")
    check_raises(golden, compiler.prepare, path)
