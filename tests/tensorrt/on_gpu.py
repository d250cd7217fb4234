"""Runs the cases of payload.py with the real TensorRT on a GPU: each layer's meaning, and each family's segments.

python -m tests.tensorrt.on_gpu FOLDER [REPORT.json] [--only TEXT] [--level N]

Needs tensorrt, cuda-bindings, numpy, networkx, pydantic and pyyaml, no PyTorch. Exits
with 1 where a case is outside of its bound.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compiler.ir.core import Graph
from compiler.ir.parser import parse
from compiler.ir.types import Sym
from compiler.lower.tensorrt.build import build_segment, make_logger
from compiler.lower.tensorrt.dialects import dialect
from compiler.lower.tensorrt.network import profiles
from compiler.lower.tensorrt.options import BuildOptions
from compiler.lower.tensorrt.plans import find_device
from specs.errors import SpecRTError

Arrays = Mapping[str, "np.ndarray[Any, Any]"]
_NUMPY = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "i64": np.int64, "bool": np.bool_}


class Device:
    """One stream, and memory that is given up at the end of a case."""

    def __init__(self) -> None:
        from cuda.bindings import driver

        self.driver = driver
        self.call("cuInit", 0)
        self.device = self.call("cuDeviceGet", 0)
        self.call("cuCtxSetCurrent", self.call("cuDevicePrimaryCtxRetain", self.device))
        self.stream = self.call("cuStreamCreate", 0)

    def call(self, name: str, *args: Any) -> Any:
        """A driver call; raises RuntimeError with its status."""
        status, *results = getattr(self.driver, name)(*args)
        if int(status) != 0:
            raise RuntimeError(f"{name}: {status.name}")
        return results[0] if results else None


def run_engine(trt: Any, runtime: Any, plan: bytes, graph: Graph, inputs: Arrays, device: Device) -> dict[str, Any]:
    """The outputs of an engine on one set of inputs, in the profile that holds them."""
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    sizes = {
        dim: size
        for value in graph.inputs
        for dim, size in zip(value.type.shape, inputs[value.name].shape, strict=True)
        if isinstance(dim, str)
    }
    chosen = [all(sym.name not in sizes or sym.lo <= sizes[sym.name] <= sym.hi for sym in ranges)
              for ranges in profiles(graph.dims)].index(True)  # fmt: skip
    if engine.num_optimization_profiles > 1:
        context.set_optimization_profile_async(chosen, int(device.stream))
        device.call("cuStreamSynchronize", device.stream)
    memory: list[Any] = []
    try:
        for value in graph.inputs:
            array = np.ascontiguousarray(inputs[value.name])
            memory.append(device.call("cuMemAlloc", max(array.nbytes, 1)))
            device.call("cuMemcpyHtoD", memory[-1], array.ctypes.data, array.nbytes)
            if not context.set_input_shape(value.name, array.shape):
                raise RuntimeError(f"`{value.name}` can't be {array.shape}")
            context.set_tensor_address(value.name, int(memory[-1]))
        outputs = {}
        for port, value in graph.outputs:
            shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in value.type.shape)
            outputs[port] = np.empty(shape, _NUMPY[value.type.dtype])
            memory.append(device.call("cuMemAlloc", max(outputs[port].nbytes, 1)))
            context.set_tensor_address(port, int(memory[-1]))
            told = engine.get_tensor_dtype(port)
            if trt.nptype(told) != outputs[port].dtype.type:
                raise RuntimeError(f"`{port}` is {told}, expected {value.type.dtype}")
        if not context.execute_async_v3(int(device.stream)):
            raise RuntimeError("TensorRT could not start it")
        device.call("cuStreamSynchronize", device.stream)
        for array, address in zip(outputs.values(), memory[len(graph.inputs) :], strict=True):
            device.call("cuMemcpyDtoH", array.ctypes.data, address, array.nbytes)
        return outputs
    finally:
        for address in memory:
            device.call("cuMemFree", address)


def compare(got: Any, expected: Any, absolute: float, relative: float) -> tuple[float, bool]:
    """The largest difference, and whether all are within absolute + relative |expected|."""
    wide, wanted = got.astype(np.float64), expected.astype(np.float64)
    difference = np.abs(wide - wanted)
    fine = bool((difference <= absolute + relative * np.abs(wanted)).all())
    return float(difference.max()) if difference.size else 0.0, fine


def run_case(trt: Any, runtime: Any, folder: Path, number: int, case: Any, options: BuildOptions, device: Device,
             timing: bytes) -> tuple[list[dict[str, Any]], bytes]:  # fmt: skip
    """One row for each output of a case, and the timing cache grown by it."""
    graph = parse((folder / f"{number}.ir").read_text(encoding="utf-8"))
    arrays = dict(np.load(folder / f"{number}.npz"))
    inputs = {name[3:]: array for name, array in arrays.items() if name.startswith("in/")}
    names = (
        case["name"].split(", ") if graph.name == "joined" else [f"{case['name']}/{port}" for port in case["bounds"]]
    )
    start = time.perf_counter()
    try:
        chosen: tuple[tuple[Sym, ...], ...] = profiles(graph.dims)
        plan, timing = build_segment(trt, graph, chosen, options, timing=timing)
        seconds = time.perf_counter() - start
        outputs = run_engine(trt, runtime, plan, graph, inputs, device)
    except (SpecRTError, RuntimeError) as error:
        return [{"case": name, "ok": False, "reason": str(error)} for name in names], timing
    rows = []
    for name, (port, (absolute, relative)) in zip(names, case["bounds"].items(), strict=True):
        off, ok = compare(outputs[port], arrays[f"out/{port}"], absolute, relative)
        rows.append({"case": name, "ok": ok, "off": off, "absolute": absolute, "relative": relative,
                     "build_seconds": round(seconds, 2), "plan_bytes": len(plan)})  # fmt: skip
    return rows, timing


def run(folder: Path, only: str = "", level: int = 1) -> dict[str, Any]:
    """A report of all cases whose name holds `only`."""
    import tensorrt as trt

    device = Device()
    runtime = trt.Runtime(make_logger(trt))
    options = BuildOptions(toolchain=dialect(trt.__version__).toolchain, level=level)
    rows: list[dict[str, Any]] = []
    timing = b""
    for number, case in enumerate(json.loads((folder / "index.json").read_text())):
        if only in case["name"]:
            found, timing = run_case(trt, runtime, folder, number, case, options, device, timing)
            rows += found
            for row in found:
                if not row["ok"]:
                    sys.stdout.write(f"WRONG {json.dumps(row)}\n")
            sys.stdout.flush()
    return {
        "tensorrt": trt.__version__, "gpu": find_device().name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "level": level,
        "cases": len(rows), "wrong": sum(not row["ok"] for row in rows), "rows": rows,
    }  # fmt: skip


def main() -> int:
    """Run, write the report, say how many are wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("report", type=Path, nargs="?")
    parser.add_argument("--only", default="")
    parser.add_argument("--level", type=int, default=1)
    given = parser.parse_args()
    report = run(given.folder, given.only, given.level)
    if given.report is not None:
        given.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{report['cases']} outputs, {report['wrong']} outside of their bounds\n")
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
