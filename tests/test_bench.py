"""The benchmark's own machinery: shapes agree with a real file, workers answer and wait stopped, ratios are right."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import gpu_serving
import gpu_steps
import report
import shapes
from compiler import benchmark
from compiler.api import compile_with, prepare, weights_of
from tests.golden_errors import ROOT
from tests.runtime.cuda.emulated import gpu  # noqa: F401 - a fixture
from tests.runtime.fake import decoder, dense_greedy
from worker import EngineError, Worker

ENGINE = """
from worker import serve

class Engine:
    def double(self, number):
        print("a library prints this")
        return 2 * number

    def fail(self):
        raise ValueError("no such weights")

serve(Engine())
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setenv("PYTHONPATH", str(shapes.ROOT / "bench"))
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    made = Worker("test", str(script), threads=1, log=tmp_path / "log")
    yield made
    made.close()


def state(process: int) -> str:
    """The process's state letter in /proc: R running, S sleeping, T stopped."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_worker_answers_and_waits_stopped(worker: Worker) -> None:
    assert [worker.call("double", number=number) for number in (3, 4)] == [6, 8]
    until = time.monotonic() + 5
    while state(worker.process.pid) != "T" and time.monotonic() < until:
        time.sleep(0.01)
    assert state(worker.process.pid) == "T"
    assert worker.call("double", number=5) == 10


def test_a_workers_error_is_told_and_it_goes_on(worker: Worker) -> None:
    with pytest.raises(EngineError, match="ValueError: no such weights"):
        worker.call("fail")
    assert worker.call("double", number=1) == 2


def test_tensors_are_those_of_the_demo_checkpoint(tmp_path: Path) -> None:
    shape = shapes.demo(tmp_path)
    with safe_open(shape.directory / "model.safetensors", framework="np") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert dict(shapes.tensors(shape.config)) == stored
    # tied: the embedding is read whole, as the head
    assert shape.bytes_per_step("fp32") == 4 * sum(math.prod(size) for size in stored.values())


def test_ratios_in_the_table() -> None:
    def engine(rate: float) -> dict[str, Any]:
        cases = ("prefill 1x8", "decode batch 1", "decode batch 8")
        return {
            "facts": {"load_s": 1.0, "peak_mb": 5, "error": 1e-6},
            "tokens_per_s": {case: [rate, 3 * rate, 2 * rate] for case in cases},
        }

    record = {
        "shape": "s",
        "dtype": "fp32",
        "bytes_per_step": 10_000_000,
        "bandwidth_gb_s": {"read": [20.0], "triad": [20.0]},
        "engines": {"specrt": engine(100.0), "peer": engine(50.0)},
        "left_out": {"other": "it has no wheel"},
    }
    table = report.table(record)
    assert "| **specrt / peer** | 2.00x | 2.00x | 2.00x |" in table
    assert "| specrt | 200 (100-300) | 200 (100-300) | 200 (100-300) | 10% / 1% |" in table
    assert "other is left out: it has no wheel" in table


def test_requests_that_arrive_over_time_are_each_measured_from_their_arrival() -> None:
    model, executable = decoder()
    asked = [gpu_serving.Asked([one, one + 1], 3 + one % 2) for one in range(9)]
    arrivals = [0.01 * number for number in range(9)]
    ids, waits = gpu_serving._over_time(model, asked, arrivals)
    assert ids == [dense_greedy(one.prompt, one.new) for one in asked] == gpu_serving._together(model, asked)
    assert all(0 < wait < 5 for wait in waits)
    assert len(executable.shapes) > 9  # nothing waited for the last to arrive


def test_mixed_requests_are_short_and_long() -> None:
    asked = gpu_serving.mixed(100, 200)
    lengths = [len(one.prompt) for one in asked]
    assert min(lengths) < 4
    assert max(lengths) > 200
    assert {8, gpu_serving.MOST_NEW} <= {one.new for one in gpu_serving.mixed(100, 2000)}
    assert asked == gpu_serving.mixed(100, 200)


@pytest.mark.usefixtures("gpu")
def test_memcheck_launches_every_kind_of_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "gpu", lambda: {"gpu": "Emulated"})
    prepared = prepare(
        ROOT / "specs" / "models" / "mixtral.yaml", size="tiny", weights="random", max_sequence=24, max_batch=2,
        precision="fp16", target="sm90", toolchain="tensorrt-8.6", out=tmp_path / "bundle",
    )  # fmt: skip
    gpu_serving.memcheck(compile_with(prepared, weights_of(prepared)), tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["greatest difference"] < 0.05  # float16, other sums
    kinds = {name.rstrip("0123456789.") for name in found["launches"]}
    wanted = {"attention.append", "attention.decode", "attention.prefill", "order", "experts", "combine", "product"}
    assert kinds == {*wanted, "rows", "choose", "carry"}


@pytest.mark.usefixtures("gpu")
def test_steps_tells_the_parts_of_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "gpu", lambda: {"gpu": "Emulated"})
    monkeypatch.setattr(benchmark, "built", lambda _: None)  # the emulated GPU has its engines
    monkeypatch.setattr(gpu_steps, "ROUNDS", 1)
    monkeypatch.setattr(gpu_steps, "_busy", lambda call: call())  # asks nvidia-smi
    prepared = prepare(
        ROOT / "specs" / "models" / "llama.yaml", size="tiny", weights="random", max_sequence=24, max_batch=2,
        precision="fp16", target="sm90", toolchain="tensorrt-8.6", out=tmp_path / "bundle",
    )  # fmt: skip
    gpu_steps.steps(compile_with(prepared, weights_of(prepared)), tmp_path / "out.json", [9])
    parts = json.loads((tmp_path / "out.json").read_text())["sizes"]["9"]["parts"]
    assert {name.split()[0] for name in parts["by step"]} >= {"kernel"}
    assert parts["steps"] == pytest.approx(sum(parts["by step"].values()))
