"""Whole models through lowering: numbers against the interpreter, what is on the disk, and what goes wrong."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch

from compiler.ir.core import Graph, walk
from compiler.lower import Decompose, lower
from compiler.lower.openvino import verdict
from compiler.passes.pipelines import decoder, encoder
from compiler.passes.runner import run_passes
from tests.lower.engine import lowered
from tests.passes import graphs
from tests.passes.graphs import Paged, Weights, batch, masked, model, outputs

# Sequences join, leave and decode beside each other's prefill.
CALLS: tuple[dict[int, list[int]], ...] = (
    {0: [token % 32 for token in range(40)]},
    {1: [3, 4, 5], 0: [7]},
    {0: [1], 1: [2], 2: list(range(9, 30))},
    {2: [3], 1: [8]},
)
ROPE = "position: {kind: rope, style: half, dims: d_head, theta: 10000.0}"
PAIRS = "position: {kind: rope, style: interleaved, dims: d_head / 2, theta: 10000.0}"
ALIBI = "position: {kind: alibi, scaled: false}"
MODELS: dict[str, dict[str, Any]] = {
    "rope": {},
    "partial interleaved rope": {"attention": f"mask: causal, {PAIRS}"},
    "window": {"attention": f"mask: causal, {ROPE}, window: 5"},
    "alibi": {"attention": f"mask: causal, {ALIBI}"},
    "alibi and window": {"attention": f"mask: causal, {ALIBI}, window: 5"},
    "softcap": {"attention": f"mask: causal, {ROPE}, softcap: 3.0"},
    "prefix": {"attention": f"mask: prefix, {ROPE}"},
    "qk norm": {"attention": f"mask: causal, {ROPE}, qk_norm: {{eps: 1.0e-5}}"},
    "multi-query": {"kv_heads": 1},
    "sinks": {"attention": f"mask: causal, {ROPE}, sinks: true"},
    "sinks and softcap": {"attention": f"mask: causal, {ROPE}, sinks: true, softcap: 3.0"},
    "experts": {"mlp": graphs.EXPERTS},
    "clamped experts": {
        "mlp": "{kind: moe, experts: 5, top_k: 2, bias: true, router: {score: softmax_of_chosen, bias: true}, "
        "expert: {kind: clamped, alpha: 1.7, limit: 0.5}}",
    },
    "layer norm, plain mlp": {
        "norm": "{kind: layer_norm, eps: 1.0e-5, bias: false}", "mlp": "{kind: mlp, act: gelu, bias: false}",
    },
}  # fmt: skip
# FP32: sums of at most 48 terms through two layers; bf16: three significant digits through two layers of size-1 values.
TOLERANCES = {"fp32": 2e-5, "bf16": 0.15}


def compiled(precision: str = "fp32", **parts: Any) -> tuple[Graph, Weights]:
    """A small decoder after all passes."""
    graph, _ = run_passes(model(**parts).graph, decoder(precision))
    return graph, Weights(graph)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_decoders_agree_with_the_interpreter(
    name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, weights = compiled(precision, **MODELS[name])
    engine, _ = lowered(graph, weights, tmp_path, precision)
    engine.allocate(24)
    expected = Paged(graph, weights)
    wanted = [expected.step(call) for call in CALLS]
    monkeypatch.setattr(graphs, "run", lambda _graph, inputs, *_: engine(inputs))
    tested = Paged(graph, weights)
    for call, reference in zip(CALLS, wanted, strict=True):
        for key, logits in tested.step(call).items():
            difference = (logits - reference[key]).abs().max() / reference[key].abs().max().clamp(min=1.0)
            assert difference <= TOLERANCES[precision], f"sequence {key} of {call}: off by {difference:.3g}"


def test_models_above_use_both_ways_of_paged_attention() -> None:
    ways = set()
    for parts in MODELS.values():
        graph, _ = compiled(**parts)
        ways |= {type(verdict(equation)) for equation in walk(graph.equations) if equation.op == "paged_attention"}
    assert len(ways) == 2
    assert Decompose in ways


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_encoders_agree_with_the_interpreter(precision: str, tmp_path: Path) -> None:
    built = model(attention=f"mask: full, {ROPE}", norm="{kind: layer_norm, eps: 1.0e-5, bias: false}")
    graph, _ = run_passes(built.graph, encoder(precision))
    weights, inputs = Weights(graph), batch((7, 3, 12))
    engine, result = lowered(graph, weights, tmp_path, precision)
    assert result.plan.cache is None
    feed = {value.name: inputs[value.name] for value in graph.inputs}
    got, expected = (masked(found["logits"], inputs) for found in (engine(feed), outputs(graph, weights, inputs)))
    assert (got - expected).abs().max() <= TOLERANCES[precision] * expected.abs().max().clamp(min=1.0)
    shorter = batch((2, 4), seed=9)  # other sizes, no recompilation
    feed = {value.name: shorter[value.name] for value in graph.inputs}
    got, expected = (masked(found["logits"], shorter) for found in (engine(feed), outputs(graph, weights, shorter)))
    assert (got - expected).abs().max() <= TOLERANCES[precision] * expected.abs().max().clamp(min=1.0)


def test_plan_binds_every_port(tmp_path: Path) -> None:
    graph, weights = compiled()
    _, result = lowered(graph, weights, tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan == json.loads(json.dumps(result.plan.as_dict()))
    assert [port["name"] for port in plan["inputs"]] == [value.name for value in graph.inputs]
    assert plan["inputs"][0] == {"name": "tokens", "dtype": "i32", "shape": ["T"]}
    assert plan["output_types"] == [{"name": "logits", "dtype": "f32", "shape": ["N", 32]}]
    assert plan["cache"]["block_size"] == 32
    assert [layer["k"] for layer in plan["cache"]["layers"]] == ["layers.0.attn.k", "layers.1.attn.k"]
    assert plan["cache"]["layers"][0] | {"k": "", "v": ""} == {
        "k": "", "v": "", "heads": 2, "dim": 8, "value_dim": 8, "dtype": "f32",
    }  # fmt: skip
    core = ov.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")
    for step in plan["steps"]:
        engine = core.read_model(tmp_path / step["file"])
        ports = {port.get_any_name() for port in engine.inputs}
        caches = {layer[letter] for layer in plan["cache"]["layers"] for letter in "kv"}
        assert ports == set(step["inputs"]) | caches
        assert set(step["outputs"]) <= {port.get_any_name() for port in engine.outputs}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["rope", "prefix"])
def test_the_same_model_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    graph, weights = compiled(**MODELS[name])
    for folder in ("first", "second"):
        lower(graph, weights, tmp_path / folder)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def test_nodes_say_where_they_come_from(tmp_path: Path) -> None:
    graph, weights = compiled()
    lower(graph, weights, tmp_path)
    text = (tmp_path / "engine" / "0.xml").read_text()
    assert 'name="layers.1.attn.o.weight"' in text
    assert 'name="x.2[1] @ model.yaml:' in text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_keep_a_narrow_type(dtype: torch.dtype, tmp_path: Path) -> None:
    """FP32 of a 16-bit checkpoint stores 16 bits: half the file, the same numbers."""
    graph, weights = compiled()
    size = sum(tensor.numel() for tensor in weights.tensors.values())
    weights.tensors = {name: tensor.to(dtype) for name, tensor in weights.tensors.items()}
    engine, _ = lowered(graph, weights, tmp_path)
    file = (tmp_path / "engine" / "0.bin").stat().st_size
    assert size * dtype.itemsize <= file < size * dtype.itemsize + 4096
    engine.allocate(24)
    reference = Paged(graph, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "run", lambda _graph, inputs, *_: engine(inputs))
        got = Paged(graph, weights).step(CALLS[0])[0]
    np.testing.assert_allclose(got, reference.step(CALLS[0])[0], rtol=2e-5, atol=2e-5)


def test_bf16_stores_bf16(tmp_path: Path) -> None:
    graph, weights = compiled("bf16")
    lower(graph, weights, tmp_path, precision="bf16")
    size = sum(tensor.numel() for tensor in weights.tensors.values())
    assert 2 * size <= (tmp_path / "engine" / "0.bin").stat().st_size < 2 * size + 4096


def test_progress_counts_layers(tmp_path: Path) -> None:
    graph, weights = compiled()
    seen: list[tuple[str, int, int]] = []
    lower(graph, weights, tmp_path, progress=lambda *what: seen.append(what))
    assert seen == [("layers", 0, 2), ("layers", 1, 2), ("layers", 2, 2), ("write", 0, 1), ("write", 1, 1)]


def test_a_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, weights = compiled()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")  # all that OpenVINO says

    monkeypatch.setattr(ov, "save_model", fail)
    with pytest.raises(RuntimeError):
        lower(graph, weights, tmp_path / "room")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OSError) as caught:
        lower(graph, weights, tmp_path / "full")
    assert caught.value.errno == errno.ENOSPC
