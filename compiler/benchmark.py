"""How fast a bundle runs on this machine: first token, tokens a second, decode steps, memory, and the bandwidth used.

Words are those of the field's benchmarks: a workload is `concurrency` requests, submitted together, of `input_len`
random tokens that make `output_len` new ones each. Times are the host's, from result to result of the engine; the
GPU's own time of a decode step is told beside. Every shape runs once before it is timed.
"""

from __future__ import annotations

import datetime
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import specs
from specs.errors import SpecRTError

if TYPE_CHECKING:
    from runtime import Model, Request
    from runtime.bundle import Bundle, Limits

TIMED = 128  # new tokens of a request whose steps the GPU times
FIRST = (128, 2048)  # input lengths of the first token, at concurrency 1
LENGTHS = ((128, 128), (128, 2048), (2048, 128), (2048, 2048))  # of TensorRT-LLM's tables, input and output
COPY = 1 << 30  # bytes that are copied to measure a GPU's bandwidth: far more than its caches hold
Told = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Workload:
    """So many requests at once, of so many tokens, that make so many new ones each."""

    input_len: int
    output_len: int
    concurrency: int

    def __str__(self) -> str:
        return f"{self.input_len}x{self.output_len}x{self.concurrency}"

    def excess(self, limits: Limits) -> str | None:
        """Why a bundle with these limits can't run it, or None."""
        if self.concurrency > limits.max_batch:
            return f"{self.concurrency} sequences at once, the bundle was compiled for {limits.max_batch}"
        if self.input_len + self.output_len > limits.max_sequence:
            return f"{self.input_len + self.output_len} tokens, the bundle was compiled for {limits.max_sequence}"
        return None


def read_workload(text: str) -> Workload:
    """`128x2048x64`: input_len, output_len, concurrency. Raises SpecRTError CLI-016 for another text."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        hint = "write INPUTxOUTPUTxCONCURRENCY: `128x2048x8` is 8 requests of 128 tokens that make 2048 new ones each"
        raise SpecRTError("CLI-016", f"`{text}` is no workload", hint=hint)
    return Workload(*map(int, parts))


def workloads_of(limits: Limits) -> list[Workload]:
    """The usual lengths at concurrency 1 and at the bundle's."""
    counts = sorted({1, limits.max_batch})
    return [Workload(given, new, count) for given, new in LENGTHS for count in counts]


def benchmark(
    path: Path, workloads: Sequence[Workload] | None = None, *, runs: int = 3, told: Told = lambda _: None
) -> dict[str, Any]:
    """Build what a GPU bundle lacks, load it, and time the workloads, by default those of the usual that fit.

    `told` gets the record as it grows. Raises SpecRTError CLI-017 where a workload is beyond the bundle's limits or
    none of the usual fits, RUN-014 for an encoder, and what building and loading raise.
    """
    import runtime
    from runtime.bundle import Bundle

    bundle = Bundle.open(path, verify=False)
    fitting, left_out = _chosen(bundle, workloads)
    record: dict[str, Any] = {"bundle": str(path), **about(bundle), "build": built(path)}
    start = time.perf_counter()
    with runtime.load(path, verify=False) as model:
        record |= {"load_seconds": time.perf_counter() - start, "cache_tokens": cache_tokens(model)}
        bench = _Bench(model, Reads.of(bundle), _bandwidth(record["machine"]), runs)
        record |= {"first_token": [], "workloads": [], "left_out": left_out}
        for length in sorted({workload.input_len for workload in fitting} | set(FIRST if workloads is None else ())):
            if length < bundle.limits.max_sequence:
                record["first_token"].append(bench.first_token(length))
                told(record)
        for workload in fitting:
            record["workloads"].append(bench.workload(workload))
            record["memory_bytes"] = memory(model)
            told(record)
        if (choices := getattr(model.executable, "choices", None)) is not None:
            record["choices"] = choices
    told(record)
    return record


def _chosen(bundle: Bundle, asked: Sequence[Workload] | None) -> tuple[list[Workload], list[dict[str, str]]]:
    """What is run, and what is left out and why."""
    fitting, left_out = [], []
    for workload in workloads_of(bundle.limits) if asked is None else asked:
        excess = workload.excess(bundle.limits)
        if excess is None:
            fitting.append(workload)
        elif asked is None:
            left_out.append({"workload": str(workload), "reason": excess})
        else:
            hint = "compile with a higher `--max-batch` or `--max-sequence`, or lower the workload"
            raise SpecRTError("CLI-017", f"the workload `{workload}` has {excess}", hint=hint)
    if not fitting:
        hint = "name one that fits: `--workload 16x16x1`"
        reason = left_out[0]["reason"]
        raise SpecRTError("CLI-017", f"none of the usual workloads fits: the least has {reason}", hint=hint)
    return fitting, left_out


# -- what it ran on ---------------------------------------------------------------------------------------------------


def about(bundle: Bundle) -> dict[str, Any]:
    """What was measured, with what, on what, and when."""
    manifest = bundle.manifest
    return {
        "model": bundle.name, "architecture": manifest["architecture"], "precision": manifest["precision"],
        "target": manifest["target"], "parameters": manifest["parameters"], "limits": asdict(bundle.limits),
        "specrt": specs.__version__, "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "machine": cpu() if manifest["target"] == "cpu" else {**gpu(), "gpus": bundle.tensor * bundle.pipeline},
    }  # fmt: skip


def _bandwidth(machine: dict[str, Any]) -> float | None:
    """GB/s that a copy reaches, of all GPUs together; None where it was not measured."""
    return machine["copy_gb_s"] * machine["gpus"] if "copy_gb_s" in machine else None


def cpu() -> dict[str, Any]:
    """The processor, the cores that this process may use, and OpenVINO."""
    from importlib import metadata

    from compiler.doctor import examine

    found = examine().cpu
    return {"cpu": found.name, "cores": found.cores, "openvino": metadata.version("openvino")}


def gpu() -> dict[str, Any]:
    """The first GPU, its driver, TensorRT if there is one, and GB/s: of a copy, measured now, and of the datasheet."""
    from cuda.bindings import driver as cu

    from compiler.lower.tensorrt.dialects import installed
    from runtime.cuda.driver import Device, check
    from specs.hardware import part_of_device

    device = Device()
    source, target = device.allocate(COPY), device.allocate(COPY)

    def milliseconds() -> float:
        start = device.event()
        check(cu.cuMemcpyDtoDAsync(target, source, COPY, device.stream))
        return device.milliseconds(start, device.event())

    copied = min(milliseconds() for _ in range(8))
    known = part_of_device(device.name)
    found = {
        "gpu": device.name, "sm": device.capability, "tensorrt": installed(),
        "driver": check(cu.cuDriverGetVersion()), "copy_gb_s": round(2 * COPY / copied / 1e6),
        "datasheet_gb_s": known[1].bandwidth if known else None,
    }  # fmt: skip
    device.close()
    return found


def built(path: Path) -> dict[str, Any] | None:
    """Build the engines that are missing: seconds and bytes, of all and of each; None where the bundle needs none."""
    from compiler.lower.tensorrt.plans import build_bundle

    start = time.perf_counter()
    plans = build_bundle(path)
    if not plans:
        return None
    return {
        "seconds": round(time.perf_counter() - start, 2), "bytes": sum(plan.bytes for plan in plans),
        "engines": [
            {"file": plan.path.name, "bytes": plan.bytes, "seconds": round(plan.seconds, 2), "cached": plan.cached}
            for plan in plans
        ],
    }  # fmt: skip


def cache_tokens(model: Model) -> int:
    """Tokens that the KV cache holds."""
    return model.executable.blocks * model.executable.block_size


def memory(model: Model) -> int:
    """Bytes: in use on the GPUs of this process, by all; of a CPU bundle the most that this process ever had."""
    devices = getattr(model.executable, "devices", None)
    if devices is not None:
        return sum(int(device.used_memory) for device in devices)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- the roofline -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reads:
    """What a decode step must read: (bytes, share that a token uses) of each weight, and KV cache for each token."""

    weights: tuple[tuple[float, float], ...]
    kv_per_token: int

    @classmethod
    def of(cls, bundle: Bundle) -> Reads:
        """From the graph that the bundle was made of."""
        from compiler.ir.parser import parse
        from compiler.ir.types import DTYPES
        from compiler.sizes import cache_bytes_per_token
        from compiler.validate.load import weights_in

        graph = parse((bundle.path / "graph.ir").read_text(encoding="utf-8"))
        read = [
            (weight.numbers * DTYPES[weight.dtype] / 8, weight.active)
            for weight in weights_in(graph)
            if weight.multiplied
        ]
        return cls(tuple(read), cache_bytes_per_token(graph))

    def bytes(self, sequences: int, context: float) -> float:
        """Of a step of `sequences` that hold `context` tokens each; experts as often as they are chosen by chance."""
        weights = sum(size * (1 - (1 - share) ** sequences) for size, share in self.weights)
        return weights + sequences * context * self.kv_per_token


# -- timing -----------------------------------------------------------------------------------------------------------


def _middle(workload: Workload) -> Workload:
    """Of a long workload its middle: sequences that are as long on average, in less time."""
    new = min(TIMED, workload.output_len)
    return replace(workload, input_len=workload.input_len + (workload.output_len - new) // 2, output_len=new)


@dataclass
class _Times:
    """Of one run: seconds, first tokens, and of the steps in which all sequences decode, on the host and the GPU.

    On the host a step lasts from one step's tokens to the next's: it may have been started while the one before ran.
    """

    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    on_gpu: list[float] = field(default_factory=list)


class _Bench:
    def __init__(self, model: Model, reads: Reads, copy_gb_s: float | None, runs: int) -> None:
        self.model, self.reads, self.copy_gb_s, self.runs = model, reads, copy_gb_s, runs
        self.generator = np.random.default_rng(1)

    def first_token(self, length: int) -> dict[str, Any]:
        """From submitting one prompt to its first new token."""
        workload = Workload(length, 1, 1)
        self.once(workload)
        self.once(workload)  # the second may capture a graph
        found = [1e3 * self.once(workload).seconds for _ in range(max(self.runs, 5))]
        return {"input_len": length, "ttft_ms": _spread(found), "runs": len(found)}

    def workload(self, workload: Workload) -> dict[str, Any]:
        """Throughput, latencies, and the share of the bandwidth that a decode step uses."""
        self.once(Workload(workload.input_len, min(4, workload.output_len), workload.concurrency))
        before = self.model.engine.preemptions
        found = [self.once(workload) for _ in range(self.runs)]
        new, given = workload.output_len * workload.concurrency, workload.input_len * workload.concurrency
        result: dict[str, Any] = {
            **asdict(workload), "runs": len(found),
            "seconds": _spread([times.seconds for times in found]),
            "output_tokens_per_second": _spread([new / times.seconds for times in found]),
            "total_tokens_per_second": _spread([(new + given) / times.seconds for times in found]),
            "ttft_ms": _spread([1e3 * second for times in found for second in times.first]),
            "preemptions": self.model.engine.preemptions - before,
        }  # fmt: skip
        steps = [1e3 * second for times in found for second in times.steps]
        if not steps or getattr(self.model.executable, "stages", 1) > 1:  # of a pipeline each step is a part of a batch
            return result
        result["decode_step_ms"] = _spread(steps)
        with self.timed_graphs() as graphs:
            on_gpu = self.once(_middle(workload), graphs).on_gpu if graphs is not None else []
        if on_gpu:
            result["decode_step_gpu_ms"] = _spread(on_gpu)
        moved = self.reads.bytes(workload.concurrency, workload.input_len + workload.output_len / 2)
        rate = moved / statistics.median(on_gpu or steps) / 1e6
        result |= {"decode_read_gb": moved / 1e9, "decode_gb_s": rate}
        result["decode_roofline_share"] = rate / self.copy_gb_s if self.copy_gb_s else None
        return result

    def once(self, workload: Workload, graphs: list[Any] | None = None) -> _Times:
        """Run a workload to its end; `graphs` is where events of the GPU's graphs arrive."""
        engine, times = self.model.engine, _Times()
        shape = (workload.concurrency, workload.input_len)
        prompts = self.generator.integers(0, self.model.vocab, shape).tolist()
        start = time.perf_counter()
        requests: list[Request] = [engine.submit(prompt, max_new_tokens=workload.output_len) for prompt in prompts]
        starting, events, end = len(requests), [], start
        while engine.busy:
            decoding, seen = not starting and all(request.finish is None for request in requests), len(graphs or ())
            moved = engine.step()
            begin, end = end, time.perf_counter()
            for request in moved:
                if len(request.new) == 1:
                    starting -= 1
                    times.first.append(end - start)
            if decoding:
                times.steps.append(end - begin)
                if all(request.finish is None for request in moved):  # what was started in this step is the next one
                    events += (graphs or [])[seen:]
        times.seconds = time.perf_counter() - start
        times.on_gpu = [self.model.executable.device.milliseconds(*pair) for pair in events]  # type: ignore[attr-defined]
        return times

    @contextmanager
    def timed_graphs(self) -> Iterator[list[Any] | None]:
        """Events around every CUDA graph that is started in the block; None where there are none."""
        device = getattr(self.model.executable, "device", None)
        if device is None:
            yield None
            return
        found: list[Any] = []
        replay = device.replay

        def measured(graph: Any) -> None:
            start = device.event()
            replay(graph)
            found.append((start, device.event()))

        device.replay = measured
        try:
            yield found
        finally:
            del device.replay


def _spread(found: Sequence[float]) -> dict[str, float]:
    """The median and the range."""
    return {"median": statistics.median(found), "least": min(found), "greatest": max(found)}
