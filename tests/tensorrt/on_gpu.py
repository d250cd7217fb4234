"""Runs the cases of payload.py with the real TensorRT on a GPU: each layer's meaning, and each family's segments.

python -m tests.tensorrt.on_gpu FOLDER [REPORT.json] [--only TEXT] [--seconds N] [--limit N] [--jobs N] [--level N]

Needs tensorrt, cuda-bindings, numpy, networkx, pydantic and pyyaml, no PyTorch. Cases are built in processes beside
each other, in the order of FOLDER, none is started after `--seconds`; one that fails, hangs or crashes is one row of
the report. Exits with 1 where a case is outside of its bound or failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from compiler.ir.core import Graph
from compiler.lower.tensorrt.build import build_segment, make_logger
from compiler.lower.tensorrt.dialects import DATA_TYPES, dialect
from compiler.lower.tensorrt.network import profiles
from compiler.lower.tensorrt.options import BuildOptions
from compiler.lower.tensorrt.plans import find_device
from tests.tensorrt.case import Arrays, Case, halves, joined, read, read_index
from tests.tensorrt.jobs import Job, run_jobs

JOINED = ("operation", "quantized")  # kinds of cases of which several are one network
TOGETHER = 20  # operations in one network: a build costs a second whatever is in it
_NUMPY = {
    "f32": np.float32, "f16": np.float16, "i32": np.int32, "i64": np.int64, "i8": np.int8, "bool": np.bool_,
}  # fmt: skip


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
    context = None if engine is None else engine.create_execution_context()
    if context is None:
        raise RuntimeError("the plan can't be loaded, TensorRT's log says why")
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
            if told != getattr(trt.DataType, DATA_TYPES[value.type.dtype]):
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
    with np.errstate(invalid="ignore"):
        difference = np.where(wide == wanted, 0.0, np.abs(wide - wanted))
        allowed = np.where(np.isfinite(wanted), absolute + relative * np.abs(wanted), 0.0)
    fine = bool((difference <= allowed).all())  # false for what is no number
    return float(difference.max()) if difference.size else 0.0, fine


@cache
def session() -> tuple[Any, Any, Device]:
    """TensorRT, its runtime and the device, once in a process."""
    import tensorrt as trt

    return trt, trt.Runtime(make_logger(trt)), Device()


@dataclass
class Check:
    """Builds and runs the cases of a job as one network; cases are told by their numbers in `folder`."""

    folder: Path
    level: int
    timing: bytes = b""

    def __call__(self, job: Job) -> list[dict[str, Any]]:
        """A row for each output; raises what went wrong with any of them."""
        cases = [read(self.folder, number) for number in job]
        whole = cases[0] if len(cases) == 1 else joined(cases)
        trt, runtime, device = session()
        options = BuildOptions(toolchain=dialect(trt.__version__).toolchain, level=self.level)
        start = time.perf_counter()
        ranges, held = profiles(whole.graph.dims), whole.held.__getitem__ if whole.held else None
        plan, self.timing = build_segment(trt, whole.graph, ranges, options, timing=self.timing, baked=held)
        seconds = time.perf_counter() - start
        outputs = run_engine(trt, runtime, plan, whole.graph, whole.inputs, device)
        rows = []
        for name, port in zip(names(cases), whole.bounds, strict=True):
            absolute, relative = whole.bounds[port]
            off, ok = compare(outputs[port], whole.outputs[port], absolute, relative)
            rows.append({
                "case": name, "ok": ok, "off": off if np.isfinite(off) else str(off), "absolute": absolute,
                "relative": relative, "build_seconds": round(seconds, 2), "together": len(job),
                "plan_bytes": len(plan),
            })  # fmt: skip
        return rows


def names(cases: Sequence[Case]) -> list[str]:
    """A row's name for each output."""
    return [case.name if len(case.bounds) == 1 else f"{case.name}/{port}" for case in cases for port in case.bounds]


def jobs_of(folder: Path, only: str) -> Iterator[Job]:
    """Cases in the order of the folder; operations of the same dims and types go into one network."""
    group: list[int] = []
    dims: Any = None
    for number, entry in enumerate(read_index(folder)):
        if only not in entry["name"]:
            continue
        graph = read(folder, number).graph if entry["kind"] in JOINED else None
        here = None if graph is None else (entry["kind"], halves(graph), graph.dims)
        if group and (here is None or here != dims or len(group) == TOGETHER):
            yield tuple(group)
            group = []
        dims = here
        if here is None:
            yield (number,)
        else:
            group.append(number)
    if group:
        yield tuple(group)


def run(
    folder: Path,
    only: str = "",
    *,
    level: int = 1,
    workers: int = 1,
    limit: float = 120.0,
    seconds: float = float("inf"),
    told: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """A report of all cases whose name holds `only`, told after each job; `not_run` names those without time."""
    from importlib.metadata import version

    gpu, index = find_device().name, read_index(folder)
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    start = time.monotonic()

    def report() -> dict[str, Any]:
        return {
            "tensorrt": version("tensorrt"), "gpu": gpu,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "level": level,
            "seconds": round(time.monotonic() - start, 1), "cases": len(rows),
            "wrong": sum(not row["ok"] for row in rows), "not_run": left, "rows": rows,
        }  # fmt: skip

    jobs = list(jobs_of(folder, only))
    for outcome in run_jobs(jobs, Check(folder, level), workers=workers, limit=limit, seconds=seconds):
        names = [index[number]["name"] for number in outcome.job]
        if not outcome.started:
            left += names
            continue
        found = outcome.result or [{"case": name, "ok": False, "reason": outcome.reason} for name in names]
        rows += found
        for row in found:
            if not row["ok"]:
                sys.stdout.write(f"WRONG {json.dumps(row)[:1000]}\n")
        sys.stdout.flush()
        told(report())
    return report()


def main() -> int:
    """Run, write the report, say how many are wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("report", type=Path, nargs="?")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--level", type=int, default=1, help="of the builder")
    parser.add_argument("--jobs", type=int, default=max((os.cpu_count() or 2) - 2, 1), help="processes")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for one network")
    parser.add_argument("--seconds", type=float, default=240.0, help="nothing is started after so many")
    given = parser.parse_args()

    def write(report: dict[str, Any]) -> None:
        if given.report is not None:
            given.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    report = run(
        given.folder, given.only, level=given.level, workers=given.jobs, limit=given.limit, seconds=given.seconds,
        told=write,
    )  # fmt: skip
    write(report)
    sys.stdout.write(
        f"{report['cases']} outputs in {report['seconds']} s, {report['wrong']} outside of their bounds or failed, "
        f"{len(report['not_run'])} cases not run\n"
    )
    return 1 if report["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
