"""The recorder's meaning of layers, and all segments, against the real TensorRT, by a script that needs no PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from compiler.ir.interpreter import run
from compiler.ir.parser import parse
from compiler.lower.tensorrt.dialects import dialect
from tests.golden_errors import ROOT
from tests.tensorrt import on_gpu, recorder
from tests.tensorrt.case import Case, joined, read, write
from tests.tensorrt.driver import recorded
from tests.tensorrt.jobs import run_jobs
from tests.tensorrt.payload import cases, operations, product, segments
from tests.tensorrt.test_contract import ALL
from tests.tensorrt.trouble import trouble


@pytest.mark.tensorrt
def test_the_real_library_computes_what_the_recorder_does(tmp_path: Path) -> None:
    import tensorrt

    write(cases(dialect(tensorrt.__version__)), tmp_path)
    report = on_gpu.run(tmp_path, workers=8)
    assert not [row for row in report["rows"] if not row["ok"]]
    assert report["cases"] > 300
    assert not report["not_run"]


def test_joined_operations_compute_what_each_does() -> None:
    line = dialect("8.6")
    some = [case for number, case in enumerate(operations(line)) if number % 40 == 0]
    case = joined([item for item in some if item.graph.dims == some[0].graph.dims][:6])
    assert parse(str(case.graph)) == case.graph
    got = recorded(recorder.module("8.6.0"), line)(case.graph, tensors(case))
    for port, expected in case.outputs.items():
        off, fine = on_gpu.compare(got[port].numpy(), expected, *case.bounds[port])
        assert fine, (case.name, port, off)


def tensors(case: Case) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in case.inputs.items()}


def test_segments_read_back_as_they_were_written(tmp_path: Path) -> None:
    found = list(segments(ALL, "fp16"))
    assert write(iter(found), tmp_path) == len(found) == 3
    for number, case in enumerate(found):
        again = read(tmp_path, number)
        assert again.graph == case.graph
        assert again.bounds == case.bounds
        outputs = run(case.graph, tensors(again), {}.__getitem__)
        assert set(outputs) == set(again.outputs)
        for port, tensor in outputs.items():
            assert on_gpu.compare(tensor.numpy(), again.outputs[port], 0.0, 0.0)[1]
            assert not on_gpu.compare(tensor.numpy() + 9, again.outputs[port], *case.bounds[port])[1]


def test_products_of_codes_compute_what_they_say(tmp_path: Path) -> None:
    """Also the engine that holds its weights, as on_gpu.py builds it: from files."""
    write([product(held=False), product(held=True)], tmp_path)
    trt, line = recorder.module("8.6.0"), dialect("8.6")
    for number in range(2):
        case = read(tmp_path, number)
        got = recorded(trt, line, case.held.__getitem__)(case.graph, tensors(case))["y"]
        assert on_gpu.compare(got.numpy(), case.outputs["y"], *case.bounds["y"])[1]
        assert sorted(case.held) == (["c", "s"] if number else [])


def test_operations_of_equal_dims_go_into_one_network(tmp_path: Path) -> None:
    found = [case for case in operations(dialect("8.6")) if case.kind == "operation"]
    chosen = sorted(found[:60], key=lambda case: str(case.graph.dims))
    write([*chosen, *segments(ALL, "fp16")], tmp_path)
    jobs = list(on_gpu.jobs_of(tmp_path, ""))
    assert [number for job in jobs for number in job] == list(range(63))
    assert jobs[-3:] == [(60,), (61,), (62,)]
    for job in jobs[:-3]:
        assert len(job) <= on_gpu.TOGETHER
        assert len({chosen[number].graph.dims for number in job}) == 1
    assert list(on_gpu.jobs_of(tmp_path, "segment 1")) == [(61,)]


def test_what_is_no_number_is_never_right() -> None:
    nan, inf = np.array([np.nan]), np.array([np.inf])
    assert not on_gpu.compare(nan, nan, 1.0, 1.0)[1]
    assert not on_gpu.compare(nan, np.array([1.0]), 1.0, 1.0)[1]
    assert on_gpu.compare(inf, inf, 0.0, 0.0) == (0.0, True)


def test_one_case_does_not_hide_another() -> None:
    found = {
        outcome.job: outcome
        for outcome in run_jobs([(0, 1, 2, 3), (4, 5), (6,), (7,)], trouble, workers=2, limit=1.0, seconds=100.0)
    }
    assert {job: outcome.result for job, outcome in found.items() if outcome.reason is None} == {
        (0,): [0], (1,): [10], (2,): [20], (4,): [40], (7,): [70],
    }  # fmt: skip
    reasons = {job: outcome.reason for job, outcome in found.items() if outcome.reason is not None}
    assert str(reasons.pop((3,))).startswith("ValueError: three (trouble, line ")
    assert reasons == {(5,): "not done after 1 seconds", (6,): "its process died with -11"}


def test_nothing_is_started_when_the_time_is_up() -> None:
    found = list(run_jobs([(0,), (1, 2)], trouble, workers=1, limit=3.0, seconds=0.0))
    assert [(outcome.job, outcome.started) for outcome in found] == [((0,), False), ((1, 2), False)]


def test_building_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'openvino', 'triton', 'transformers')))\n"
        "import compiler.lower.tensorrt.plans, tests.tensorrt.on_gpu, runtime"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
