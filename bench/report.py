"""The tables that bench/cpu.py prints, and what it says about the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OURS = "specrt"
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


def machine(threads: int) -> dict[str, Any]:
    """Processor, its features that matter here, threads used, versions and commit."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(part.split(":", 1) for part in (line.replace("\t", "") for line in info.splitlines()) if ":" in part)
    flags = lines.get("flags", "").split()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "cpu": lines.get("model name", platform.processor()).strip(),
        "features": [flag for flag in FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "load_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "openvino")},
        "commit": commit.stdout.strip(),
    }


def _range(samples: list[float]) -> str:
    """Median and range, as many digits as carry meaning."""
    digits = 1 if statistics.median(samples) < 100 else 0
    return f"{statistics.median(samples):,.{digits}f} ({min(samples):,.{digits}f}-{max(samples):,.{digits}f})"


def table(record: dict[str, Any]) -> str:
    """One model and dtype as Markdown: tokens/s as median (lowest-highest), and what else each engine showed."""
    bandwidth = statistics.median(record["bandwidth_gb_s"]["read"])
    engines: dict[str, Any] = record["engines"]
    lines = [
        f"\n### {record['shape']}, {record['dtype']}\n",
        f"Memory in GB/s: read {_range(record['bandwidth_gb_s']['read'])}, "
        f"triad {_range(record['bandwidth_gb_s']['triad'])}; "
        f"a decode step reads {record['bytes_per_step'] / 1e6:,.0f} MB of weights.\n",
    ]
    lines += [f"{engine} is left out: {reason}\n" for engine, reason in record["left_out"].items()]
    if not engines:
        return "\n".join(lines)
    cases = list(next(iter(engines.values()))["tokens_per_s"])
    heads = ["tokens/s", *cases, "bandwidth used, batch 1 / 8", "compile", "load", "memory", "error"]
    lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, engine in engines.items():
        facts, samples = engine["facts"], engine["tokens_per_s"]
        share = [
            statistics.median(samples[f"decode batch {batch}"]) / batch * record["bytes_per_step"] / 1e9 / bandwidth
            for batch in (1, 8)
        ]
        compile_s = f"{facts['compile_s']:.1f} s" if "compile_s" in facts else ""
        error = "" if facts["error"] is None else f"{facts['error']:.0e}"
        cells = [name, *(_range(samples[case]) for case in cases), " / ".join(f"{part:.0%}" for part in share)]
        lines.append(
            f"| {' | '.join(cells)} | {compile_s} | {facts['load_s']:.1f} s | {facts['peak_mb']:,} MB | {error} |"
        )
    for peer in engines:
        if OURS in engines and peer != OURS:
            ours, theirs = engines[OURS]["tokens_per_s"], engines[peer]["tokens_per_s"]
            ratios = [f"{statistics.median(ours[case]) / statistics.median(theirs[case]):.2f}x" for case in cases]
            lines.append(f"| **{OURS} / {peer}** | {' | '.join(ratios)} | | | | | |")
    return "\n".join(lines)
