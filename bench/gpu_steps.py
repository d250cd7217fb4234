"""Where the time of a call goes on a GPU, for bench/gpu.py: the host, each step of the plan, all as one graph."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS = 7
QUERY = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active")


def steps(bundle: Path, out: Path, sizes: Sequence[int]) -> None:
    """A prompt of each size, alone: milliseconds around the call, of the host until all is in the stream, of each kind
    of step by the GPU's clock, and of the same call as a CUDA graph; OUT is written after each size."""
    import runtime
    from compiler.benchmark import about, built
    from runtime.cuda import batch

    result: dict[str, Any] = {"build": built(bundle), "sizes": {}}
    with runtime.load(bundle, verify=False) as model:
        result = about(model.bundle) | result
        generator = np.random.default_rng(1)

        def call(size: int) -> float:
            model.engine.submit(generator.integers(0, model.vocab, size).tolist(), max_new_tokens=1)
            start = time.perf_counter()
            model.engine.step()
            return (time.perf_counter() - start) * 1e3

        captured, batch.PROMPT_MOST = batch.PROMPT_MOST, 0
        for size in sizes:
            found: dict[str, Any] = {}
            call(size)
            found["step by step"] = [round(call(size), 3) for _ in range(ROUNDS)]
            found["parts"] = _parts(model, partial(call, size))
            found["without a pause"] = _busy(partial(call, size))
            batch.PROMPT_MOST = 1 << 20
            call(size), call(size)
            found["graph"] = [round(call(size), 3) for _ in range(ROUNDS)]
            batch.PROMPT_MOST = 0
            result["sizes"][str(size)] = found
            print(size, json.dumps(found), flush=True)
            out.write_text(json.dumps(result, indent=1))
        batch.PROMPT_MOST = captured


def _parts(model: Any, call: Callable[[], float]) -> dict[str, Any]:
    """Times of one call by step, with events between its steps; the least of some calls by their whole."""
    from runtime.cuda.graphs import Ways

    executable = model.executable
    device, program, graphs = executable.device, executable._program, executable.graphs
    times: list[tuple[str, Any, Any]] = []

    def watched(name: str, way: Any) -> Any:
        def enqueue(given: Any) -> None:
            start = device.event()
            way(given)
            times.append((name, start, device.event()))

        return enqueue

    before = graphs._ways
    names = [f"{step.kind} {step.file or step.name}"[:40] for step in program.steps]
    plain = [watched(name, way) for name, way in zip(names, before.plain, strict=True)]
    rows = [{n: watched(f"rows {name}", way) for n, way in kinds.items()}
            for name, kinds in zip(names, before.rows, strict=True)]  # fmt: skip
    graphs._ways = Ways(plain, rows)
    direct, kept = graphs.direct, []

    def timed(given: Any) -> None:
        start = time.perf_counter()
        direct(given)
        kept.append((time.perf_counter() - start) * 1e3)

    graphs.direct = timed
    found: list[dict[str, Any]] = []
    for _ in range(ROUNDS):
        times.clear()
        whole = call()
        sums: dict[str, float] = {}
        for name, start, stop in times:
            sums[name] = sums.get(name, 0.0) + device.milliseconds(start, stop)
        found.append({"call": whole, "host": kept[-1], "steps": sum(sums.values()), "by step": sums})
    graphs._ways, graphs.direct = before, direct
    return min(found, key=lambda one: float(one["call"]))


def _busy(call: Callable[[], float], seconds: float = 3.0) -> dict[str, Any]:
    """Calls for some seconds: whether the GPU lowers its clock, which nvidia-smi tells in the middle."""
    found: list[float] = []
    asked: subprocess.Popen[str] | None = None
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        found.append(call())
        if asked is None and time.perf_counter() - start > seconds / 2:
            query = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
            asked = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
    told = asked.communicate()[0].strip() if asked else ""
    half = len(found) // 2
    return {"calls": len(found), "first": round(statistics.median(found[:5]), 3),
            "later": round(statistics.median(found[half:]), 3), "nvidia-smi": told}  # fmt: skip
