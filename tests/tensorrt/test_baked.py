"""Engines that hold their weights, from a deployment file to what they compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import compiler
import compiler.api
from compiler.api import weights_of
from compiler.ir import Graph
from compiler.ir.interpreter import run
from compiler.kernels import library
from compiler.lower.tensorrt import plans
from compiler.lower.tensorrt.cut import cut
from compiler.lower.tensorrt.dialects import dialect
from compiler.lower.tensorrt.network import create_network, emit
from compiler.lower.tensorrt.stored import stored_arrays
from runtime.bundle import Bundle
from specs.errors import SpecRTError
from tests.golden_errors import ROOT
from tests.tensorrt import recorder
from tests.tensorrt.driver import Values, packed, run_plan, states_of

DEPLOYMENT = """\
deployment: 1
checkpoint: {demo}
target: sm90
toolchain: tensorrt-10.8
precision: bf16
build:
  level: 3
  hardware: ampere_plus
  weights: baked
  weight_streaming: true
limits: {{max_batch: 4, max_sequence: 64}}
"""


def deployment(folder: Path, **changes: str) -> Path:
    text = DEPLOYMENT.format(demo=ROOT / "demo" / "tiny-llama")
    for old, new in changes.items():
        text = text.replace(f"{old}: ", f"{new}: ")
    path = folder / "deployment.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("precision", ["bf16", "w4a16"])
def test_baked_engines_compute_the_model(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "write_kernels", lambda *_: None)
    monkeypatch.setattr(plans, "installed", lambda: None)
    path = deployment(tmp_path)
    path.write_text(path.read_text().replace("precision: bf16", f"precision: {precision}"))
    out = compiler.compile(path, out=tmp_path / "bundle")
    opened = Bundle.open(out)
    assert opened.program.build["level"] == 3
    engines = [step for step in opened.program.steps if step.kind == "engine"]
    assert len({step.file for step in engines}) == len(engines) == 7  # no two hold the same weights
    assert not any(name.startswith("weight:") for step in engines for name in step.inputs.values())
    prepared = compiler.prepare(path)
    pieces = cut(prepared.graph, baked=True)
    arrays = stored_arrays(out, opened.plan["weights"])
    trt, line = recorder.module("10.8.0"), dialect("10.8.0")

    def engine(graph: Graph, inputs: Values) -> dict[str, torch.Tensor]:
        network: Any = create_network(trt, trt.Builder(trt.Logger()), line)
        emitter = emit(trt, graph, network, line, arrays)
        network.finish()
        outputs: dict[str, torch.Tensor] = network.evaluate(inputs)
        del emitter
        return outputs

    batch = packed(prepared.graph, [0, 0, 0], [5, 1, 9])
    got = run_plan(pieces, batch, {}, states_of(pieces.graph), engine)["logits"]
    expected = run(prepared.graph, batch, weights_of(prepared), states_of(pieces.graph))["logits"]
    # six layers of some ten roundings each, in bfloat16
    assert (got - expected).abs().max() <= 60 * 2.0**-8 * expected.abs().max()


def test_every_key_of_build_is_read(tmp_path: Path) -> None:
    asked = compiler.api.request(deployment(tmp_path))
    assert dict(asked.build) == {
        "level": 3, "hardware": "ampere_plus", "weights": "baked", "weight_streaming": True,
    }  # fmt: skip
    assert asked.options().toolchain == "tensorrt-10.8"
    with pytest.raises(SpecRTError) as caught:
        compiler.prepare(deployment(tmp_path, level="effort"))
    assert caught.value.code == "SPEC-004"
