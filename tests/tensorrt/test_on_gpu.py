"""The recorder's meaning of layers, and all segments, against the real TensorRT, by a script that needs no PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compiler.ir.interpreter import run
from compiler.ir.parser import parse
from compiler.lower.tensorrt.dialects import dialect
from tests.golden_errors import ROOT
from tests.tensorrt import on_gpu, recorder
from tests.tensorrt.driver import recorded
from tests.tensorrt.payload import cases, joined, operations, segments, write
from tests.tensorrt.test_contract import ALL


@pytest.mark.tensorrt
def test_the_real_library_computes_what_the_recorder_does(tmp_path: Path) -> None:
    import tensorrt

    write(cases(dialect(tensorrt.__version__)), tmp_path)
    report = on_gpu.run(tmp_path)
    assert not [row for row in report["rows"] if not row["ok"]]
    assert report["cases"] > 300


def test_joined_operations_compute_what_each_does() -> None:
    line = dialect("8.6")
    some = [case for number, case in enumerate(operations(line)) if number % 40 == 0]
    case = joined([item for item in some if item.graph.dims == some[0].graph.dims][:6])
    assert parse(str(case.graph)) == case.graph
    got = recorded(recorder.module("8.6.0"), line)(case.graph, case.inputs)
    for port, tensor in case.outputs.items():
        off, fine = on_gpu.compare(got[port].numpy(), tensor.numpy(), *case.bounds[port])
        assert fine, (case.name, port, off)


def test_segments_read_back_as_they_were_written(tmp_path: Path) -> None:
    found = list(segments(ALL, "fp16"))
    assert write(iter(found), tmp_path) == len(found) == 3
    for number, case in enumerate(found):
        graph = parse((tmp_path / f"{number}.ir").read_text())
        arrays = np.load(tmp_path / f"{number}.npz")
        assert graph == case.graph
        outputs = run(graph, case.inputs, {}.__getitem__)
        for port, tensor in outputs.items():
            assert on_gpu.compare(tensor.numpy(), arrays[f"out/{port}"], 0.0, 0.0)[1]
            assert not on_gpu.compare(tensor.numpy() + 9, arrays[f"out/{port}"], *case.bounds[port])[1]


def test_building_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'openvino', 'triton', 'transformers')))\n"
        "import compiler.lower.tensorrt.plans, tests.tensorrt.on_gpu, runtime"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
