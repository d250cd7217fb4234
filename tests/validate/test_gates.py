"""Gates: kept where they hold, reached by leaving the worst linears alone where not, refused where that can't help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import compiler
from compiler.validate.emulate import Subject, emulate
from tests.golden_errors import ROOT, check_raises

SPEC = ROOT / "specs" / "models" / "llama.yaml"


@pytest.fixture(scope="module")
def plain() -> float:
    """The mean KL divergence of w4a16 on this random model, without gates."""
    ((_, numbers),) = emulate(Subject(SPEC, "tiny"), ["w4a16"])
    return float(numbers["mean_kl"])


def deployment(folder: Path, gates: str, precision: str = "w4a16") -> Path:
    path = folder / "deploy.yaml"
    path.write_text(
        f"deployment: 1\nmodel: {SPEC}\nsize: tiny\nweights: random\nprecision: {precision}\nout: bundle\n"
        f"gates: {gates}\n",
        encoding="utf-8",
    )
    return path


def card(bundle: Path) -> dict[str, Any]:
    content = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["gates"]
    assert isinstance(content, dict)
    return content


def test_gates_that_hold_change_nothing(plain: float, tmp_path: Path) -> None:
    found = card(compiler.compile(deployment(tmp_path, f"{{mean_kl: {plain * 1.01:.9f}}}")))
    assert (found["kept"], found["attempts"], found["of"]) == ([], 1, 14)
    assert found["with"]["mean_kl"] == pytest.approx(plain)


def test_gates_that_miss_keep_the_worst_linears(plain: float, tmp_path: Path) -> None:
    limit = plain / 2
    bundle = compiler.compile(deployment(tmp_path, f"{{mean_kl: {limit:.9f}}}"))
    found = card(bundle)
    assert 0 < len(found["kept"]) < found["of"] == 14
    assert found["with"]["mean_kl"] <= limit < found["without"]["mean_kl"]
    # the bundle itself, not the card: what was kept is stored whole, the rest in 4 bits
    graph = (bundle / "graph.ir").read_text(encoding="utf-8")
    assert "i4[" in graph
    kept = found["kept"][0].split(".", 2)[2]
    assert f"{kept}.weight" in graph


def test_an_impossible_gate_leaves_no_bundle(tmp_path: Path) -> None:
    path = deployment(tmp_path, "{top1: 1.5}")
    check_raises("VAL-010", compiler.compile, path)
    assert not (tmp_path / "bundle").exists()
    assert [item.name for item in tmp_path.iterdir()] == ["deploy.yaml"]


def test_perplexity_needs_text(tmp_path: Path) -> None:
    check_raises("VAL-011", compiler.compile, deployment(tmp_path, "{perplexity: 0.01}"))


def test_a_gate_on_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("And God said, Let there be light: and there was light. " * 4)
    path = tmp_path / "deploy.yaml"
    demo = ROOT / "demo" / "tiny-llama"
    path.write_text(
        f"deployment: 1\ncheckpoint: {demo}\nprecision: bf16\nout: bundle\n"
        "gates: {perplexity: 0.02, top1: 0.9, text: text.txt}\n"
    )
    found = card(compiler.compile(path))
    assert found["with"]["perplexity"] == pytest.approx(found["with"]["reference_perplexity"], rel=0.02)
    assert (found["kept"], found["of"]) == ([], 0)
