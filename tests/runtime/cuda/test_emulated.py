"""The GPU runtime on an emulated GPU, with every kind of step, against the IR."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from compiler.api import compile_with, prepare, weights_of
from compiler.benchmark import Reads, Workload, _Bench
from compiler.kernels import attention
from compiler.validate.metrics import agreement
from compiler.validate.reference import outputs, random_rows
from runtime.executable import LIKELIEST
from specs.precision import load_recipe
from tests.precision.models import MODELS, calibration, quantized_graph, served

LENGTHS = (1, 7)


def model_and_reference(spec: str, precision: str, folder: Path) -> tuple[runtime.Model, list[Any], list[Any]]:
    """A tiny model on the emulated GPU, rows of tokens, and what the interpreter makes of them."""
    data = {"calibration": calibration(folder)} if load_recipe(precision).calibration else {}
    prepared = prepare(
        MODELS / f"{spec}.yaml", size="tiny", weights="random", max_sequence=64, max_batch=2, precision=precision,
        target="sm90", toolchain="tensorrt-8.6", out=folder / "bundle", **data,
    )  # fmt: skip
    weights = weights_of(prepared)
    rows = random_rows(prepared.source.config["vocab"], LENGTHS)
    expected = [row["logits"] for row in outputs(quantized_graph(prepared), weights, rows)]
    return runtime.load(compile_with(prepared, weights)), rows, expected


# Each takes ten seconds. SPECRT_ALL_PAIRS=1: the others too.
PAIRS = [("llama", "w4a16"), ("gpt_oss", "mxfp4"), ("llama", "bf16")]
OTHERS = [("mixtral", "fp8_rowwise"), ("mixtral", "w8a16"), ("llama", "nvfp4"), ("llama", "mxfp8"), ("llama", "w4a8")]
OTHERS += [
    ("mixtral", "bf16"),
    ("llama", "w8a8_sq_static"),
    ("llama", "fp16"),
    ("llama", "w8a8_sq"),
    ("llama", "fp8"),
    ("bloom", "w8a16"),
]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("spec", "precision"), PAIRS + OTHERS if os.environ.get("SPECRT_ALL_PAIRS") else PAIRS)
def test_logits_and_generation(spec: str, precision: str, tmp_path: Path) -> None:
    model, rows, expected = model_and_reference(spec, precision, tmp_path)
    found = model.logits(rows)
    assert agreement(found, expected).relative <= load_recipe(precision).bound.relative
    made = model.generate(rows, max_new_tokens=4, stop=())
    again = model.logits([[*row, *new] for row, new in zip(rows, made, strict=True)])
    for row, new, logits in zip(rows, made, again, strict=True):
        for at, token in enumerate(new):
            best = logits[len(row) + at - 1]
            assert best[token] >= np.max(best) - 0.05 * np.abs(best).max()  # other sums in another company


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("cache", ["int8", "fp8"] if os.environ.get("SPECRT_ALL_PAIRS") else ["int8"])
def test_a_cache_of_codes(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences alone and together, in pieces, and what the graph with its cache says; decode appends by itself."""
    monkeypatch.setattr(attention, "APPENDS", 1)
    options: dict[str, Any] = {"size": "tiny", "weights": "random", "max_sequence": 64, "max_batch": 2}
    options |= {"precision": "fp16", "kv_cache": cache, "target": "sm90", "toolchain": "tensorrt-8.6"}
    prepared = prepare(MODELS / "llama.yaml", out=tmp_path / "bundle", **options)
    weights = weights_of(prepared)
    rows = random_rows(prepared.source.config["vocab"], LENGTHS)
    bundle = compile_with(prepared, weights)
    model = runtime.load(bundle)
    expected = served(prepared, weights, rows)
    assert agreement(model.logits(rows), expected).relative <= load_recipe("fp16").bound.relative
    layer = prepared.source.config
    row = layer["d_head"] + 8
    assert model.executable.cache_bytes == model.executable.blocks * 32 * layer["layers"] * 2 * layer["kv_heads"] * row
    together = model.generate(rows, max_new_tokens=3, stop=())
    assert together == [model.generate([row], max_new_tokens=3, stop=())[0] for row in rows]


@pytest.mark.usefixtures("gpu")
def test_a_step_behind_one_that_nobody_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens stay on the device, its arrays in memory of their own: ids are those of one step after the other."""
    model, rows, _ = model_and_reference("llama", "w4a16", tmp_path)
    executable: Any = model.executable
    launch, launched = executable.launch, []

    def recorded(batch: Any, sources: Any = (), how: Any = LIKELIEST, behind: int = 1) -> int:
        unknown = [place for place, source in enumerate(sources) if source >= 0]
        batch["tokens"][unknown] = -1  # nobody may read them
        ticket = int(launch(batch, sources, how, behind))
        launched.append((list(sources), len(executable.device.queue)))
        return ticket

    with monkeypatch.context() as patch:
        patch.setattr(executable, "launch", recorded)
        ahead = model.generate(rows, max_new_tokens=4, stop=())
        assert [sources for sources, _ in launched] == [[], [0, 1], [0, 1], [0, 1]]
        assert launched[1][1] > launched[0][1] > 0  # both wait in the stream
        patch.setattr(model.engine, "_ahead", None)
        assert model.generate(rows, max_new_tokens=4, stop=()) == ahead
        assert not any(sources for sources, _ in launched[4:])
        count = len(launched)
        drawn = model.generate(rows, max_new_tokens=3, stop=(), temperature=0.9, top_k=30, top_p=0.9, seed=3)
        assert len(launched) == count + 3  # no logits come to the host
        patch.setattr(model.engine, "_picks", None)
        assert model.generate(rows, max_new_tokens=3, stop=(), temperature=0.9, top_k=30, top_p=0.9, seed=3) == drawn
    bench = _Bench(model, Reads((), 0), None, 1)
    with bench.timed_graphs() as graphs:
        times = bench.once(Workload(5, 4, 2), graphs)
    # three steps in which both decode; the first was started before the first tokens were read
    assert (len(times.first), len(times.steps), len(times.on_gpu)) == (2, 3, 2)
    # a ticket is good for two launches, and closing waits for what nobody does
    model.engine.submit(rows[0], max_new_tokens=9)
    model.engine.step()
    model.engine.step()
    with pytest.raises(AssertionError, match="ticket"):
        executable.wait(1)
    device = executable.device
    assert device.queue
    model.close()
    assert not device.queue


@pytest.mark.usefixtures("gpu")
def test_an_encoder_without_engines(tmp_path: Path) -> None:
    """One program; rows of two lengths are padded, and the kernel of attention is told how long rows are."""
    prepared = prepare(
        MODELS / "bert.yaml", size="tiny", weights="random", max_sequence=64, max_batch=2, precision="bf16",
        target="sm90", toolchain="tensorrt-8.6", out=tmp_path / "bundle",
    )  # fmt: skip
    weights = weights_of(prepared)
    rows = random_rows(prepared.source.config["vocab"], LENGTHS)
    expected = [row["last_hidden_state"] for row in outputs(prepared.graph, weights, rows)]
    found = [row["last_hidden_state"] for row in runtime.load(compile_with(prepared, weights)).forward(rows)]
    assert agreement(found, expected).relative <= load_recipe("bf16").bound.relative
