"""Milliseconds of one product in TensorRT on a real GPU: float16, and INT8 codes as inputs and held by the engine.

python bench/gpu_int8.py OUT.json [LEVEL]      where the GPU is; about a minute; needs no PyTorch

Each in a process of its own, built as the compiler builds segments. Tells whether codes that are inputs of an engine
are multiplied as codes, which TensorRT 8.6 says nothing about.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

OUTS, INS, ROWS, ROUNDS = 12288, 4096, (1, 64, 2048), 50
DIMS = "dim T in 1..64..2048"
FLOAT = f"""graph segment(%x: f16[T,{INS}], %w: f16[{OUTS},{INS}]) {{
  {DIMS}
  %y: f16[T,{OUTS}] = matmul(%x, %w) {{transpose_b = true}}
  return y = %y
}}"""
ROUNDED = f"""
  %q: i8[T,{INS}] = quantize(%x, %t) {{dtype = "i8"}}
  %r: f16[T,{INS}] = dequantize(%q, %t) {{dtype = "f16"}}
  %w: f16[{OUTS},{INS}] = dequantize(%c, %s) {{dtype = "f16"}}
  %y: f16[T,{OUTS}] = matmul(%r, %w) {{transpose_b = true}}
  return y = %y
}}"""
CODES, SCALE = f"i8[{OUTS},{INS}]", f"f32[{OUTS},1]"
INPUTS = f"graph segment(%x: f16[T,{INS}], %t: f32[1], %c: {CODES}, %s: {SCALE}) {{\n  {DIMS}{ROUNDED}"
WEIGHTS = f'%c: {CODES} = weight() {{name = "c"}}\n  %s: {SCALE} = weight() {{name = "s"}}'
HELD = f"graph segment(%x: f16[T,{INS}], %t: f32[1]) {{\n  {DIMS}\n  {WEIGHTS}{ROUNDED}"
RANGE = "int8, codes as inputs of a stated range"  # what 8.6 asks of INT8 inputs outside of explicit quantization
FORMS = {"float16": FLOAT, "int8, codes as inputs": INPUTS, "int8, codes held": HELD, RANGE: INPUTS}


@dataclass
class Measure:
    """Builds and times the forms of a job."""

    level: int

    def __call__(self, job: tuple[int, ...]) -> list[dict[str, Any]]:
        """A row for each number of rows."""
        return [row for number in job for row in measure(list(FORMS)[number], self.level)]


def measure(name: str, level: int) -> list[dict[str, Any]]:
    """Build one form and time it."""
    from compiler.ir.parser import parse
    from compiler.lower.tensorrt.build import build_segment
    from compiler.lower.tensorrt.dialects import dialect
    from compiler.lower.tensorrt.network import profiles
    from compiler.lower.tensorrt.options import BuildOptions
    from tests.tensorrt.on_gpu import session

    trt, runtime, device = session()
    if name == RANGE:
        _state_ranges()
    graph, generator = parse(FORMS[name]), np.random.default_rng(0)
    held: dict[str, np.ndarray[Any, Any]] = {
        "c": generator.integers(-127, 128, (OUTS, INS), dtype=np.int8),
        "s": np.full((OUTS, 1), 1e-3, np.float32), "t": np.full(1, 0.03, np.float32),
    }  # fmt: skip
    ranges, options = profiles(graph.dims), BuildOptions(toolchain=dialect(trt.__version__).toolchain, level=level)
    start = time.perf_counter()
    plan, _ = build_segment(trt, graph, ranges, options, baked=held.__getitem__)
    seconds = time.perf_counter() - start
    engine = runtime.deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    given = {**held, "x": generator.standard_normal((ROWS[-1], INS)).astype(np.float16)}
    if name == "float16":
        given["w"] = generator.standard_normal((OUTS, INS)).astype(np.float16)
    for value in graph.inputs:
        array = np.ascontiguousarray(given[value.name])
        address = device.call("cuMemAlloc", array.nbytes)
        device.call("cuMemcpyHtoD", address, array.ctypes.data, array.nbytes)
        context.set_tensor_address(value.name, int(address))
    context.set_tensor_address("y", int(device.call("cuMemAlloc", ROWS[-1] * OUTS * 2)))
    rows = []
    for count in ROWS:
        chosen = next(index for index, dims in enumerate(ranges) if dims[0].lo <= count <= dims[0].hi)
        context.set_optimization_profile_async(chosen, int(device.stream))
        for value in graph.inputs:
            context.set_input_shape(value.name, (count, INS) if value.name == "x" else given[value.name].shape)
        for _ in range(5):
            context.execute_async_v3(int(device.stream))
        device.call("cuStreamSynchronize", device.stream)
        start = time.perf_counter()
        for _ in range(ROUNDS):
            context.execute_async_v3(int(device.stream))
        device.call("cuStreamSynchronize", device.stream)
        each = (time.perf_counter() - start) / ROUNDS
        rows.append({
            "form": name, "rows": count, "milliseconds": round(each * 1e3, 4),
            "tera_operations_per_second": round(2e-12 * count * OUTS * INS / each, 1),
            "build_seconds": round(seconds, 1), "plan_bytes": len(plan),
        })  # fmt: skip
    return rows


def _state_ranges() -> None:
    """Inputs of INT8 get a dynamic range from here on, in this process."""
    from compiler.ir.core import Value
    from compiler.lower.tensorrt.emitter import Emitter

    plain = Emitter.input

    def ranged(self: Emitter, value: Value) -> None:
        plain(self, value)
        if value.type.dtype == "i8":
            self.scope[value.name].set_dynamic_range(-127.0, 127.0)

    Emitter.input = ranged  # type: ignore[method-assign]


def main() -> int:
    """Measure all forms, beside each other while they build; write and print what came of each."""
    from compiler.lower.tensorrt.plans import find_device
    from tests.tensorrt.jobs import run_jobs

    level = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    report: dict[str, Any] = {"gpu": find_device().name, "date": time.strftime("%Y-%m-%d"), "level": level, "rows": []}
    jobs = [(number,) for number in range(len(FORMS))]
    for outcome in run_jobs(jobs, Measure(level), workers=1, limit=150.0, seconds=300.0):
        failed = [{"form": list(FORMS)[outcome.job[0]], "reason": outcome.reason or "no time was left"}]
        report["rows"] += outcome.result or failed
    Path(sys.argv[1]).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
