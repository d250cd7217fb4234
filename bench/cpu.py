"""Speed on this CPU, ours beside transformers and llama.cpp, in one run.

    python bench/cpu.py [--shapes tiny,1b] [--dtypes fp32,bf16,w8a16,w4a16] [--engines specrt,transformers,llama.cpp]

All engines of a model and dtype stay loaded, each in its own process on the same cores, and take turns: every round
measures the memory bandwidth and then each engine once, so that a slow minute of a shared machine falls on all of them.
Prints medians with their range, writes every sample to bench/results/, and checks that the engines compute the same
function. The random 1.1B checkpoint, its GGUF files and our bundles are kept outside the repository (--cache).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import report
from shapes import ROOT, SHAPES, Shape
from worker import EngineError, Worker

SCRIPTS = {
    "specrt": "engine_specrt.py",
    "transformers": "engine_transformers.py",
    "llama.cpp": "engine_llama_cpp.py",
}
BATCHES = (1, 8)
TOKENS = 640  # the longest sequence that any case reaches


@dataclass
class Run:
    """One engine on one model and dtype: what loading told, and samples in tokens/s for each case."""

    engine: str
    facts: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)

    def add(self, case: str, rate: float) -> None:
        """Record one sample."""
        self.samples.setdefault(case, []).append(rate)

    def median(self, case: str) -> float:
        """The median of a case, in tokens/s."""
        return statistics.median(self.samples[case])


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="tiny,1b", help=f"of {', '.join(SHAPES)} (default: all)")
    parser.add_argument(
        "--dtypes", default="fp32,bf16", help="also w8a8_block, w8a16 (beside Q8_0), w4a8, w4a16 (Q4_0)"
    )
    parser.add_argument("--engines", default=",".join(SCRIPTS))
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: %(default)s")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "specrt-bench")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument(
        "--llama-python",
        default=os.environ.get("SPECRT_LLAMA_PYTHON", sys.executable),
        help="the interpreter that has llama-cpp-python (default: $SPECRT_LLAMA_PYTHON, else this one)",
    )
    return parser.parse_args()


def start(engine: str, shape: Shape, dtype: str, args: argparse.Namespace) -> tuple[Worker, dict[str, Any]]:
    """Make what the engine loads, start it and load; EngineError where it can't."""
    python = args.llama_python if engine == "llama.cpp" else sys.executable
    log = args.cache / f"{engine}.log"
    artifact = args.cache / f"{shape.name}-{dtype}"
    facts: dict[str, Any] = {}
    if engine == "llama.cpp":
        artifact = artifact.with_name(artifact.name + ".gguf")
        if not artifact.exists():
            import gguf_file

            unfinished = artifact.with_suffix(".unfinished")
            gguf_file.write(shape.directory, shape.config, dtype, unfinished)
            unfinished.replace(artifact)
    elif engine == "specrt":
        # in a process of its own: the memory that compiling took must not count as memory of running
        builder = Worker(engine, SCRIPTS[engine], threads=args.threads, log=log)
        try:
            facts = builder.call("compile", checkpoint=str(shape.directory), dtype=dtype, out=str(artifact))
            facts["compile_peak_mb"] = builder.peak_mb
        finally:
            builder.close()
    worker = Worker(engine, SCRIPTS[engine], python=python, threads=args.threads, log=log)
    try:
        facts |= worker.call(
            "load",
            checkpoint=str(shape.directory),
            artifact=str(artifact),
            dtype=dtype,
            threads=args.threads,
            batch=max(BATCHES),
            tokens=TOKENS,
            vocab=shape.config["vocab_size"],
        )
    except EngineError:
        worker.close()
        raise
    return worker, facts


def prompts(rng: np.random.Generator, shape: Shape, batch: int, tokens: int) -> list[list[int]]:
    """Random ids [B, S]: new in every call, so that nothing can be remembered."""
    rows: list[list[int]] = rng.integers(3, shape.config["vocab_size"], (batch, tokens)).tolist()
    return rows


def measure(worker: Worker, run: Run, shape: Shape, seed: int) -> None:
    """One round of one engine: prefill and decode at each batch; every engine gets the round's same prompts."""
    rng = np.random.default_rng(seed)
    for batch in BATCHES:
        length = shape.prefill[batch]
        took = worker.call("prefill", prompts=prompts(rng, shape, batch, length))
        run.add(f"prefill {batch}x{length}", batch * length / took)
    for batch in BATCHES:
        took = worker.call("decode", prompts=prompts(rng, shape, batch, shape.context), steps=shape.steps)
        run.add(f"decode batch {batch}", batch * shape.steps / took)


def warm(worker: Worker, shape: Shape) -> None:
    """Each case once, shortened, so that no sample pays for first use."""
    rng = np.random.default_rng(1)
    for batch in BATCHES:
        worker.call("prefill", prompts=prompts(rng, shape, batch, shape.prefill[batch]))
        worker.call("decode", prompts=prompts(rng, shape, batch, shape.context), steps=4)


def compare(
    shape: Shape, dtype: str, args: argparse.Namespace, memory: Worker, reference: np.ndarray[Any, Any] | None
) -> tuple[dict[str, Any], np.ndarray[Any, Any] | None]:
    """Measure all engines on one model and dtype; gives the record, and the reference logits if they were made here."""
    workers: dict[str, Worker] = {}
    runs: dict[str, Run] = {}
    failures: dict[str, str] = {}
    bandwidth = Run("memory")
    prompt = prompts(np.random.default_rng(0), shape, 1, 48)[0]
    try:
        for engine in args.engines.split(","):
            say(f"{shape.name} {dtype}: loading {engine}")
            try:
                worker, facts = start(engine, shape, dtype, args)
                workers[engine], runs[engine] = worker, Run(engine, facts)
                warm(worker, shape)
            except EngineError as error:
                failures[engine] = str(error)
                say(f"left out: {error}")
                if engine in workers:
                    workers.pop(engine).close()
                    del runs[engine]
                continue
            worker.call("logits", prompt=prompt, out=str(args.cache / "logits.npy"))
            logits = np.load(args.cache / "logits.npy")
            if engine == "transformers" and dtype == "fp32":
                reference = logits
            facts["logits"] = logits
        for round_ in range(args.repeats):
            say(f"{shape.name} {dtype}: round {round_ + 1} of {args.repeats}")
            for kind, rate in memory.call("bandwidth").items():
                bandwidth.add(kind, rate)
            for engine, worker in workers.items():
                measure(worker, runs[engine], shape, seed=100 + round_)
        for engine, run in runs.items():
            run.facts["peak_mb"] = workers[engine].peak_mb
            logits = run.facts.pop("logits")
            run.facts["error"] = None if reference is None else float(np.abs(logits - reference).max())
    finally:
        for worker in workers.values():
            worker.close()
    record = {
        "shape": shape.name,
        "dtype": dtype,
        "bytes_per_step": shape.bytes_per_step(dtype),
        "bandwidth_gb_s": bandwidth.samples,
        "engines": {name: {"facts": run.facts, "tokens_per_s": run.samples} for name, run in runs.items()},
        "left_out": failures,
    }
    return record, reference


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Run what the command line asks for."""
    args = options()
    args.cache.mkdir(parents=True, exist_ok=True)
    memory = Worker("memory", "engine_memory.py", threads=args.threads, log=args.cache / "memory.log")
    records = []
    try:
        memory.call("load", threads=args.threads)
        for key in args.shapes.split(","):
            shape, reference = SHAPES[key](args.cache), None
            for dtype in args.dtypes.split(","):
                record, reference = compare(shape, dtype, args, memory, reference)
                records.append(record)
                print(report.table(record), flush=True)
    finally:
        memory.close()
    now = datetime.datetime.now(datetime.timezone.utc)
    result = {"date": now.isoformat(timespec="seconds"), "machine": report.machine(args.threads), "runs": records}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"cpu-{now:%Y%m%dT%H%M}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    say(f"wrote {path}")


if __name__ == "__main__":
    main()
