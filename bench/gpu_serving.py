"""Requests that come and go, for bench/gpu.py: arriving over time, for minutes on end, and under compute-sanitizer."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from runtime import Model, Request

COUNT = 256  # requests that arrive
LONGEST, MOST_NEW = 300, 128  # tokens of a prompt, new ones
PRESSURE = 2.0  # how much faster requests arrive than fixed batches get them done
KINDS = {"w": "product", "chosen": "order", "slots": "experts", "results": "combine"}  # of a launch, by an argument
SAMPLE = 10.0  # seconds between two looks at the memory of a soak
KNOWN = 16  # requests of a soak whose ids are known and compared whenever they come


@dataclass(frozen=True)
class Asked:
    """A prompt and how many new tokens are wanted of it."""

    prompt: list[int]
    new: int


def mixed(vocab: int, count: int, seed: int = 0) -> list[Asked]:
    """Requests of mixed lengths: as many between 1 and 17 tokens as between 17 and 300."""
    generator = np.random.default_rng(seed)
    lengths = np.exp(generator.uniform(0, np.log(LONGEST), count)).astype(int)
    news = generator.integers(8, MOST_NEW + 1, count)
    return [
        Asked(generator.integers(0, vocab, length).tolist(), int(new))
        for length, new in zip(lengths, news, strict=True)
    ]


def _submit(model: Model, asked: Asked) -> Request:
    return model.engine.submit(asked.prompt, max_new_tokens=asked.new)


def _together(model: Model, batch: Sequence[Asked]) -> list[list[int]]:
    """Submit all at once and wait for the last."""
    requests = [_submit(model, asked) for asked in batch]
    while model.engine.busy:
        model.engine.step()
    return [request.new for request in requests]


def _over_time(model: Model, asked: Sequence[Asked], arrivals: Sequence[float]) -> tuple[list[list[int]], list[float]]:
    """Submit each when its time has come; gives ids, and seconds from arrival to the last token."""
    engine, done = model.engine, [0.0] * len(asked)
    requests: list[Request] = []
    start = time.perf_counter()
    number: dict[int, int] = {}
    while len(requests) < len(asked) or engine.busy:
        now = time.perf_counter() - start
        while len(requests) < len(asked) and arrivals[len(requests)] <= now:
            requests.append(_submit(model, asked[len(requests)]))
            number[id(requests[-1])] = len(requests) - 1
        if not engine.busy:
            time.sleep(max(0.0, arrivals[len(requests)] - now))
            continue
        for request in engine.step():
            if request.finish is not None:
                done[number[id(request)]] = time.perf_counter() - start - arrivals[number[id(request)]]
    return [request.new for request in requests], done


def arrivals(bundle: Path, out: Path, count: int = COUNT) -> None:
    """The same requests alone, in fixed batches, all at once and arriving over time: ids, tokens/s, latencies.

    Fixed batches have all requests at once, and wait for the longest of each batch: their best case and their flaw.
    """
    import runtime
    from compiler.benchmark import about, built

    build = built(bundle)
    with runtime.load(bundle) as model:
        asked = mixed(model.vocab, count)
        size = model.limits.max_batch
        new = sum(one.new for one in asked)
        result: dict[str, Any] = {
            **about(model.bundle), "build": build, "requests": count, "new tokens": new, "batch": size,
            "prompt tokens": sum(len(one.prompt) for one in asked),
        }  # fmt: skip

        def save(name: str, ids: list[list[int]], seconds: float, **more: Any) -> None:
            same = sum(found == right for found, right in zip(ids, expected, strict=True))
            result[name] = {"equal": same, "seconds": seconds, "tokens/s": new / seconds, **more}
            out.write_text(json.dumps(result, indent=1))
            print(name, result[name], flush=True)

        _together(model, asked)  # every shape once
        start = time.perf_counter()
        expected = [_together(model, [one])[0] for one in asked]
        save("alone", expected, time.perf_counter() - start)
        start = time.perf_counter()
        batches = [ids for at in range(0, count, size) for ids in _together(model, asked[at : at + size])]
        fixed = time.perf_counter() - start
        save("fixed batches", batches, fixed)
        start = time.perf_counter()
        ids = _together(model, asked)
        save("all at once", ids, time.perf_counter() - start)
        gaps = np.random.default_rng(1).exponential(1.0, count)  # a Poisson process
        times = (np.cumsum(gaps) / gaps.sum() * fixed / PRESSURE).tolist()
        start = time.perf_counter()
        ids, waits = _over_time(model, asked, times)
        seconds = time.perf_counter() - start
        ordered = sorted(waits)
        latency = {"median": statistics.median(waits), "99 %": ordered[int(0.99 * (count - 1))]}
        more = {"last arrival": times[-1], "times as fast as fixed": fixed / seconds, "latency": latency}
        save("arriving over time", ids, seconds, **more)


def drawn(bundle: Path, out: Path) -> None:
    """Tokens/s of greedy ids, of ids drawn on the device and of ids drawn by the host, and how many of these agree."""
    import runtime
    from compiler.benchmark import about, built

    how: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 1}
    build = built(bundle)
    with runtime.load(bundle) as model:
        result: dict[str, Any] = {**about(model.bundle), "build": build, "sampling": how}
        prompts = np.random.default_rng(1).integers(0, model.vocab, (model.limits.max_batch, 128)).tolist()
        picks = model.engine._picks
        for count in (1, len(prompts)):
            found: dict[str, Any] = {}
            ids: dict[str, list[list[int]]] = {}
            for name, options, chosen in (("greedy", {}, picks), ("device", how, picks), ("host", how, None)):
                model.engine._picks = chosen
                for _ in range(2):  # the second is timed
                    start = time.perf_counter()
                    ids[name] = model.generate(prompts[:count], max_new_tokens=64, stop=(), **options)
                    found[name] = count * 64 / (time.perf_counter() - start)
            pairs = zip(ids["device"], ids["host"], strict=True)
            found["equal to the host's"] = sum(one == other for one, other in pairs)
            result[f"{count} sequences"] = found
            print(count, found, flush=True)
            out.write_text(json.dumps(result, indent=1))


def soak(bundle: Path, out: Path, seconds: float) -> None:
    """Keep the engine busy with mixed requests; memory and counts every few seconds, ids of some compared."""
    import runtime
    from compiler.benchmark import about, built, memory

    build = built(bundle)
    with runtime.load(bundle) as model:
        engine = model.engine
        known = mixed(model.vocab, KNOWN, seed=2)
        expected = [_together(model, [one])[0] for one in known]
        result: dict[str, Any] = {
            **about(model.bundle), "build": build, "samples": [], "compared": 0, "wrong": 0,
            "columns": ["seconds", "bytes of all processes", "MiB of this", "submitted", "finished", "tokens", "wrong"],
        }  # fmt: skip
        generator = np.random.default_rng(3)
        flight: dict[int, tuple[Request, int | None]] = {}
        submitted = finished = tokens = 0
        start = following = time.perf_counter()
        while (now := time.perf_counter()) - start < seconds or flight:
            while len(flight) < 2 * model.limits.max_batch and now - start < seconds:
                which = int(generator.integers(0, 2 * KNOWN))  # every second one is known
                one = known[which] if which < KNOWN else mixed(model.vocab, 1, int(generator.integers(1 << 31)))[0]
                request = _submit(model, one)
                flight[id(request)] = (request, which if which < KNOWN else None)
                submitted += 1
            for moved in engine.step():
                tokens += 1
                if moved.finish is not None:
                    _, place = flight.pop(id(moved))
                    finished += 1
                    result["compared"] += place is not None
                    result["wrong"] += place is not None and moved.new != expected[place]
            if now >= following or not flight:
                following = now + SAMPLE
                used = [memory(model), own_memory()]
                row = [round(now - start, 1), *used, submitted, finished, tokens, result["wrong"]]
                result["samples"].append(row)
                out.write_text(json.dumps(result, indent=1))
                print(row, flush=True)
        settled = [row[1:3] for row in result["samples"] if row[0] >= 2 * SAMPLE] or [result["samples"][-1][1:3]]
        result["growth bytes"] = settled[-1][0] - settled[0][0]
        if None not in (settled[-1][1], settled[0][1]):
            result["growth MiB of this process"] = settled[-1][1] - settled[0][1]
        result["free blocks"] = [engine.free_blocks, model.executable.blocks]
        out.write_text(json.dumps(result, indent=1))
        print(f"growth {result['growth bytes']} bytes, {result['wrong']} of {result['compared']} wrong", flush=True)


def own_memory() -> int | None:
    """MiB that this process has on GPUs, as the driver counts them; None where it does not tell."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    told = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    for line in told.splitlines():
        pid, _, used = line.partition(",")
        if pid.strip() == str(os.getpid()) and used.strip().isdigit():
            return int(used)
    return None


def memcheck(bundle: Path, out: Path) -> None:
    """Every kernel of a small bundle without graphs, segments by their kernels for few rows wherever they fit.

    For `compute-sanitizer --tool memcheck --error-exitcode 9 python3.10 bench/gpu.py memcheck ...`, engines being built
    before. The logits of both ways are compared too.
    """
    from compiler.benchmark import about
    from runtime.bundle import Bundle
    from runtime.cuda.executable import CUDAExecutable
    from runtime.model import Model

    opened = Bundle.open(bundle)
    limits = opened.limits
    result: dict[str, Any] = about(opened)
    cache, tokens = min(8192, limits.max_batch * limits.max_sequence), min(512, opened.program.dims["T"][2])
    executable = CUDAExecutable(opened, tokens=tokens, cache_tokens=cache, graphs=False)
    launched: dict[str, int] = {}
    with Model(opened, executable, step_tokens=tokens) as model:
        _count_launches(executable, launched)
        longest = min(900, limits.max_sequence - 4)
        asked = [Asked(one.prompt[:longest], 3) for one in mixed(model.vocab, min(20, limits.max_batch), seed=4)]
        asked[0] = Asked([at % model.vocab for at in range(longest)], 4)  # long: the keys are cut often
        rows = [one.prompt[:60] for one in asked[:3]]
        ways: Any = executable.graphs
        ways._way = lambda *_: "engine"
        engines = model.logits(rows)
        ways._way = lambda *_: "rows"
        kernels = model.logits(rows)
        result["greatest difference"] = max(
            float(np.abs(a - b).max()) for a, b in zip(engines, kernels, strict=True)
        )  # fmt: skip
        for several in ([asked[0]], asked[1:3], asked):
            _together(model, several)
    result["launches"] = launched
    out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result), flush=True)


def _count_launches(executable: Any, launched: dict[str, int]) -> None:
    """Count the launches of each kernel of the bundle."""
    device = executable.device
    launch = device.launch
    kernels = executable._kernels
    names = {id(one.function): f"attention.{name}" for kind in kernels.attention.values() for name, one in kind.items()}
    names |= {id(one.function): name for name, one in kernels.others.items()}
    for sizes in kernels.programs.values():
        for size, program in sizes.items():
            for call in program.calls:
                kind = next((what for argument, what in KINDS.items() if argument in call.places), "rows")
                names[id(call.kernel.function)] = f"{kind}.{size}"

    def counted(function: Any, *rest: Any) -> None:
        name = names.get(id(function), "other")
        launched[name] = launched.get(name, 0) + 1
        launch(function, *rest)

    device.launch = counted
