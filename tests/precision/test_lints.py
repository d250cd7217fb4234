"""What is told of a precision that works and may surprise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compiler.api import prepare
from compiler.explain import explain
from compiler.precision.lints import lints

DEMO = Path(__file__).resolve().parents[2] / "demo" / "tiny-llama"


def told(source: Path, **options: str) -> list[str]:
    return [lint.text for lint in lints(prepare(source, **options)) if lint.code != "hazard"]


def test_groups_that_do_not_divide() -> None:
    assert told(DEMO, precision="w4a16") == ["mlp.down x 6: 704 inputs are no multiple of 128: 64 share a scale"]
    assert told(DEMO, precision="w8a16") == []
    assert told(DEMO) == []


def test_rows_in_place_of_groups(tmp_path: Path) -> None:
    recipe = (DEMO.parents[1] / "specs" / "precisions" / "w4a16.yaml").read_text()
    own = tmp_path / "odd.yaml"
    own.write_text(recipe.replace("name: w4a16", "name: odd").replace("[128, 64, 32]", "[512]"))
    found = told(DEMO, precision=str(own))
    assert "mlp.down x 6: 704 inputs are no multiple of 512: all of an output share one scale" in found
    assert any(fact.text == found[0] for fact in explain(prepare(DEMO, precision=str(own))).facts)


@pytest.mark.parametrize(("target", "advice"), [("cpu", "bf16 or fp32"), ("sm75", "fp32"), ("sm90", "bf16 or fp32")])
def test_float16_for_a_model_of_bfloat16(target: str, advice: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "config.json").read_text())
    on_gpu = {} if target == "cpu" else {"toolchain": "tensorrt-10.0"}
    assert told(folder, precision="fp16", target=target, **on_gpu) == []
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    (found,) = told(folder, precision="fp16", target=target, **on_gpu)
    assert found.endswith(f"may overflow; take {advice}")
    assert told(folder, precision="fp32", target=target, **on_gpu) == []
