"""The matrix says no more than what is known: levels, reasons, records and their age, totals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from compiler.validate.emulate import Subject
from compiler.validate.html import page
from compiler.validate.matrix import Choice, Model, assemble, within
from compiler.validate.records import Record, age, digest, read_records
from compiler.validate.report import Cell, Report, markdown
from specs.precision import load_recipe
from tests.golden_errors import ROOT, check_raises

SPEC = ROOT / "specs" / "models" / "llama.yaml"
MODEL = Model("llama", "LLaMA", Subject(SPEC, "tiny"), "7b")
CHOICE = Choice(("fp32", "fp16", "fp8"), ("sm70", "sm80", "sm90"), ("tensorrt-8.6", "tensorrt-10.8"))
GOOD = {"mean_kl": 1e-9, "relative": 1e-6, "top1": 1.0, "subject": "3 rows", "profile": []}


def record(**changes: str) -> Record:
    recipe = load_recipe("fp16")
    known = {
        "level": "executed", "model": "llama", "precision": "fp16", "gpu": "sm90", "toolchain": "tensorrt-8.6",
        "date": "2026-11-25", "versions": "TensorRT 8.6.0", "text": "H200", "spec": digest(SPEC),
        "recipe": digest(Path(recipe.where.file)),
    }  # fmt: skip
    return Record(**{**known, **changes})


def report(numbers: dict[str, object] | None = None, *records: Record) -> Report:
    emulated = {("llama", "fp16"): numbers} if numbers is not None else {}
    return assemble([MODEL], CHOICE, emulated, records, "specrt validate")


def at(found: Report, precision: str, gpu: str, toolchain: str) -> Cell:
    (cell,) = [c for c in found.cells if (c.precision, c.gpu, c.toolchain) == (precision, gpu, toolchain)]
    return cell


def test_what_the_data_forbids_is_refused_with_its_reason() -> None:
    found = report(GOOD)
    cell = at(found, "fp8", "sm80", "tensorrt-10.8")
    assert (cell.level, cell.code) == ("refused", "gpu-math")
    assert "fp8 needs SM89 or newer" in cell.reason
    assert at(found, "fp32", "sm70", "tensorrt-10.8").code == "toolchain-gpu"
    assert at(found, "fp16", "sm70", "tensorrt-8.6").level == "emulated"


def test_what_kernels_alone_lack_is_refused() -> None:
    """Where no engine has the precision, a model must be kernels as a whole."""
    choice = Choice(("bf16",), ("sm75", "sm90"), ("tensorrt-8.6",))
    models = [Model(name, name, Subject(SPEC.with_name(f"{name}.yaml"), "tiny"), "7b") for name in ("llama",)]
    models.append(Model("deepseek_v3", "V3", Subject(SPEC.with_name("deepseek_v3.yaml"), "tiny"), "671b"))
    found = assemble(models, choice, {}, (), "specrt validate")
    cells = {(cell.model, cell.gpu): (cell.level, cell.code) for cell in found.cells if cell.gpu != "cpu"}
    assert cells == {
        ("llama", "sm75"): ("refused", "base"), ("llama", "sm90"): ("declared", "base"),
        ("deepseek_v3", "sm75"): ("refused", "base"), ("deepseek_v3", "sm90"): ("refused", "kernels"),
    }  # fmt: skip


def test_levels_rise_with_what_is_shown_and_not_before() -> None:
    assert at(report(), "fp16", "sm90", "tensorrt-8.6").level == "declared"
    bound = load_recipe("fp16").bound.mean_kl
    wrong = at(report({**GOOD, "mean_kl": 2 * bound}), "fp16", "sm90", "tensorrt-8.6")
    assert wrong.level == "declared"
    assert "further from float32" in wrong.reason
    found = report(GOOD, record())
    assert at(found, "fp16", "sm90", "tensorrt-8.6").level == "executed"
    assert at(found, "fp16", "sm80", "tensorrt-8.6").level == "emulated"
    assert at(found, "fp16", "sm90", "tensorrt-10.8").level == "emulated"
    emitted = report(GOOD, record(level="emitted", gpu="any"))
    assert at(emitted, "fp16", "sm80", "tensorrt-8.6").level == "emitted"
    assert found.totals() == {"refused": 0, "declared": 2, "emulated": 0, "emitted": 0, "executed": 1}


def test_a_network_says_nothing_of_kernel_steps() -> None:
    recipe = digest(Path(load_recipe("fp8").where.file))
    records = [
        record(level="emitted", gpu="any", precision="fp8", toolchain=line, recipe=recipe)
        for line in ("tensorrt-8.6", "tensorrt-10.8")
    ]
    found = assemble([MODEL], CHOICE, {("llama", "fp8"): GOOD}, records, "specrt validate")
    assert at(found, "fp8", "sm90", "tensorrt-10.8").level == "emitted"
    assert at(found, "fp8", "sm90", "tensorrt-8.6").level == "emulated"  # 8.6 has no FP8: kernels of ours


def test_what_can_not_be_compiled_is_not_emulated() -> None:
    assert at(report({"error": {"code": "X"}}), "fp16", "sm90", "tensorrt-8.6").level == "declared"


def test_without_words_to_predict_the_relative_error_decides() -> None:
    numbers = {"mean_kl": None, "relative": 0.1, "bound_kl": 1.0, "bound_relative": 0.2}
    assert within(numbers)
    assert not within({**numbers, "relative": 0.3})
    assert not within({**numbers, "relative": None})


def test_old_evidence_is_shown_as_stale() -> None:
    found = report(GOOD, record(spec="0" * 64))
    cell = at(found, "fp16", "sm90", "tensorrt-8.6")
    assert (cell.level, cell.stale) == ("executed", True)
    assert found.evidence[cell.evidence[-1]].stale == "the spec changed since"
    assert age(record(), SPEC, load_recipe("fp16")) == ""
    assert age(record(recipe="x", spec="y"), SPEC, load_recipe("fp16")) == "the spec and the recipe changed since"


def test_a_digest_does_not_see_comments(tmp_path: Path) -> None:
    one, other = tmp_path / "a.yaml", tmp_path / "b.yaml"
    one.write_text("a: 1  # why\n# more\nb: 2\n")
    other.write_text("a: 1\n\nb: 2")
    assert digest(one) == digest(other)
    other.write_text("a: 1\nb: 3\n")
    assert digest(one) != digest(other)


def test_a_digest_does_not_see_how_numbers_are_found(tmp_path: Path) -> None:
    one, other = tmp_path / "a.yaml", tmp_path / "b.yaml"
    one.write_text("weights: {type: i8, per: row}\nbase: [fp16]\n")
    other.write_text("weights: {type: i8, per: row, rounding: gptq}\ncalibration: {windows: 1}\nbase: [fp16]\n")
    assert digest(one) == digest(other)
    other.write_text("weights: {type: i8, per: tensor, rounding: gptq}\nbase: [fp16]\n")
    assert digest(one) != digest(other)


@pytest.mark.parametrize(
    ("golden", "text"),
    [
        ("VAL-003", '{"records": [{"level": "executed", "model": "llama"}]}'),
        ("VAL-003-level", json.dumps({"records": [dataclasses.asdict(record(level="sworn"))]})),
        ("VAL-003-json", '{"records": ['),
    ],
)
def test_broken_records(golden: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    check_raises(golden, lambda: list(read_records(tmp_path)))


def test_records_are_read_and_other_files_are_not(tmp_path: Path) -> None:
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "run.json").write_text(json.dumps({"records": [dataclasses.asdict(record())]}))
    (tmp_path / "families.json").write_text(json.dumps({"other": 1}))
    assert list(read_records(tmp_path)) == [record()]


def test_the_page_holds_the_report_and_fetches_nothing() -> None:
    content = report({**GOOD, "subject": "rows </script> of ids", "relative": float("nan")}).as_dict()
    text = page(content)
    assert text.count("</script>") == 2
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    start = text.index('id="data">') + len('id="data">')
    inside = json.loads(text[start : text.index("</script>", start)])
    assert len(inside["cells"]["rows"]) == len(content["cells"])
    assert inside["numbers"]["llama|fp16"]["relative"] is None


def test_markdown_has_the_totals_and_the_reasons() -> None:
    text = markdown(report(GOOD).as_dict())
    assert "| Emulated | 1 |" in text
    assert "| LLaMA | Declared | Emulated 1.0e-09 | Declared |" in text
    assert "- `gpu-math`: fp8 needs SM89 or newer; sm80 has no such tensor cores" in text


def test_sizes_and_fits_are_of_the_published_size() -> None:
    found = report(GOOD)
    numbers = found.numbers["llama|fp16"]
    assert numbers["weight_bytes"] == 2 * 6_738_415_616
    assert numbers["kv_bytes_per_token"] == 2 * 2 * 32 * 4096
    assert found.fits["llama|fp16"]["h200"]["batch"] == 64  # 141 * 0.9 - 13.5 GB at 1.07 GB for 2048 tokens, 2^6
    assert found.fits["llama|fp32"]["t4" if "t4" in found.fits["llama|fp32"] else "v100-sxm2"]["batch"] >= 0
