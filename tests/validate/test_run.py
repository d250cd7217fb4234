"""Emulation of cells: numbers against the reference, kept files, and what a change of code or data undoes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from compiler.validate import run
from compiler.validate.emulate import Subject, emulate
from compiler.validate.models import model_of, rows_of
from tests.golden_errors import ROOT, check_raises

SPEC = ROOT / "specs" / "models" / "llama.yaml"
DEMO = ROOT / "demo" / "tiny-llama"


def test_numbers_of_a_precision() -> None:
    found = dict(emulate(Subject(SPEC, "tiny"), ["fp32", "bf16", "no-such"]))
    # float32 against the interpreter: as tests/families; bfloat16 has 8 bits, and 2 layers of some 20 roundings
    assert found["fp32"]["max_abs"] < 2e-4
    assert 1e-4 < found["bf16"]["relative"] < 20 * 2**-9
    assert found["fp32"]["top1"] == 1.0
    assert found["bf16"]["profile"][0]["value"] == "embed"
    assert "code" in found["no-such"]["error"]


def test_text_gives_a_perplexity() -> None:
    rows = tuple(
        tuple(row) for row in np.load(DEMO / "calibration-tokens.npy").reshape(-1)[:80].reshape(2, 40).tolist()
    )
    ((_, numbers),) = emulate(Subject(DEMO, rows=rows), ["fp32"])
    assert numbers["perplexity"] == pytest.approx(numbers["reference_perplexity"], rel=1e-4)
    assert 5 < numbers["perplexity"] < 200


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [model_of(SPEC, None, None, None)]
    first = run.emulate_all(models, ["fp32"], tmp_path, jobs=1)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    monkeypatch.setattr(run, "_in_processes", lambda work, *_: iter(()) if not work else pytest.fail("done again"))
    assert run.emulate_all(models, ["fp32"], tmp_path, jobs=1) == first


def test_a_key_changes_with_all_that_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "llama.yaml"
    other.write_text(SPEC.read_text(encoding="utf-8").replace("10000.0", "10001.0"), encoding="utf-8")
    subject = Subject(SPEC, "tiny")
    keys = [
        run.key(subject, "fp32"), run.key(subject, "bf16"), run.key(Subject(SPEC, "demo"), "fp32"),
        run.key(Subject(other, "tiny"), "fp32"), run.key(Subject(SPEC, "tiny", seed=1), "fp32"),
        run.key(Subject(SPEC, "tiny", rows=((1, 2),)), "fp32"),
    ]  # fmt: skip
    monkeypatch.setattr(run, "code_digest", lambda: "changed")
    keys.append(run.key(subject, "fp32"))
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    assert run.key(subject, "fp32") == keys[0]


def test_rows_of_text_and_ids(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("In the beginning God created the heaven and the earth. " * 100)
    rows = rows_of(tmp_path / "a.txt", DEMO)
    assert 1 < len(rows) <= 8
    assert all(1 < len(row) <= 256 for row in rows)
    np.save(tmp_path / "ids.npy", np.arange(10))
    assert rows_of(tmp_path / "ids.npy", DEMO) == (tuple(range(10)),)
    (tmp_path / "empty.txt").write_text("")
    check_raises("VAL-006", rows_of, tmp_path / "empty.txt", DEMO)
    spec = tmp_path / "small.yaml"  # of its own: the sizes of a shipped spec may grow
    spec.write_text(re.sub(r"^  (7b|13b|70b|8b|\d.*|demo):.*\n", "", SPEC.read_text(encoding="utf-8"), flags=re.M))
    check_raises("VAL-005", model_of, spec, "8x", None, None)


def test_a_deployment_names_model_text_and_calibration(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("And God said, Let there be light. " * 40)
    path = tmp_path / "serve.yaml"
    path.write_text(
        f"deployment: 1\ncheckpoint: {DEMO}\nprecision: fp32\ncalibration: {DEMO}/calibration-tokens.npy\n"
        "gates: {mean_kl: 0.1, text: text.txt}\n"
    )
    model = model_of(path, None, None, None)
    assert (model.name, model.subject.source, model.subject.size) == ("serve", DEMO, None)
    assert model.subject.calibration == DEMO / "calibration-tokens.npy"
    assert model.subject.rows == rows_of(tmp_path / "text.txt", DEMO)
    path.write_text(f"deployment: 1\nmodel: {SPEC}\nsize: tiny\nweights: random\n")
    random = model_of(path, None, None, None)
    assert (random.subject.source, random.subject.size, random.subject.rows) == (SPEC, "tiny", None)
    assert dict(emulate(random.subject, ["fp32"]))["fp32"]["top1"] == 1.0
