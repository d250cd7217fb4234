"""A bundle in stages on real GPUs, beside the same bundle on one of them: what it gives, and how fast.

python bench/gpu_pipeline.py equal BUNDLE OUT.json                         logits, ids, beams; alone and together
python bench/gpu_pipeline.py speed BUNDLE OUT.json [INxOUTxBATCH ...]      each workload, first tokens, time of stages
python bench/gpu_pipeline.py copies OUT.json                               from one GPU to the next
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu import where

PROMPTS = (1, 7, 40, 130, 300)  # tokens
NEW = 48
WORKLOADS = ("128x128x1", "128x128x8", "128x128x64", "2048x128x64")
PIECES = (2048, 1024, 512)  # most tokens of a prompt in a step
FIRST = (128, 2048)
SIZES = [8 << 10 << shift for shift in range(0, 13, 2)]  # bytes


def load(path: Path, stages: bool, tokens: int = 2048) -> Any:
    """A bundle of several stages, with them or on one GPU."""
    from runtime.bundle import Bundle
    from runtime.cuda.executable import CUDAExecutable
    from runtime.cuda.pipeline import Pipeline
    from runtime.model import Model

    bundle = Bundle.open(path, verify=False)
    tokens = min(tokens, bundle.program.dims["T"][2])
    if stages:
        return Model(bundle, Pipeline(bundle, devices=range(bundle.pipeline), tokens=tokens), step_tokens=tokens)
    bundle = replace(bundle, pipeline=1, program=replace(bundle.program, stages=(0,)))
    return Model(bundle, CUDAExecutable(bundle, tokens=tokens), step_tokens=tokens)


def equal(path: Path, out: Path) -> None:
    """What both ways give; alone a sequence has the same launches in both, together it is in other company."""
    given: list[dict[str, Any]] = []
    for stages in (False, True):
        with load(path, stages) as model:
            generator = np.random.default_rng(0)
            longest = model.limits.max_sequence - NEW
            prompts = [generator.integers(0, model.vocab, min(count, longest)).tolist() for count in PROMPTS]
            given.append({
                "logits": [model.logits([prompt])[0] for prompt in prompts],
                "alone": [model.generate([prompt], max_new_tokens=NEW, stop=())[0] for prompt in prompts],
                "together": model.generate(prompts, max_new_tokens=NEW, stop=()),
                "drawn": [model.generate([prompt], max_new_tokens=NEW, stop=(), temperature=0.8, seed=1)[0]
                          for prompt in prompts],
                "beams": model.generate(prompts[1:3], max_new_tokens=NEW, stop=(), num_beams=3),
            })  # fmt: skip
    one, several = given
    result: dict[str, Any] = {**where(), "bundle": path.name}
    result["logits"] = [bool(np.array_equal(a, b)) for a, b in zip(one["logits"], several["logits"], strict=True)]
    for name in ("alone", "together", "drawn", "beams"):
        result[name] = [a == b for a, b in zip(one[name], several[name], strict=True)]
    result["together as alone, one GPU"] = [a == b for a, b in zip(one["alone"], one["together"], strict=True)]
    result["together as alone, stages"] = [a == b for a, b in zip(several["alone"], several["together"], strict=True)]
    out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


@contextmanager
def timed(devices: Sequence[Any]) -> Iterator[list[list[Any]]]:
    """Events around each graph of each GPU."""
    found: list[list[Any]] = [[] for _ in devices]

    def measured(device: Any, events: list[Any]) -> Callable[[Any], None]:
        replay = device.replay

        def again(graph: Any) -> None:
            start = device.event()
            replay(graph)
            events.append((start, device.event()))

        return again

    for device, events in zip(devices, found, strict=True):
        device.replay = measured(device, events)
    try:
        yield found
    finally:
        for device in devices:
            del device.replay


def speed(path: Path, out: Path, workloads: Sequence[str]) -> None:
    """Both ways, and stages that work one after the other on all sequences at once; OUT is written after each."""
    from compiler.benchmark import Reads, _Bench, about, read_workload
    from runtime.bundle import Bundle

    asked = [read_workload(text) for text in workloads]
    record: dict[str, Any] = {**where(), **about(Bundle.open(path, verify=False)), "bundle": path.name}

    def told(name: str, key: str, value: Any) -> None:
        record.setdefault(name, {})[key] = value
        out.write_text(json.dumps(record, indent=1))
        print(name, key, json.dumps(value), flush=True)

    for name, stages, pieces in (("one GPU", False, PIECES[:1]), ("stages", True, PIECES)):
        for tokens in pieces:
            with load(path, stages, tokens) as model:
                bench = _Bench(model, Reads((), 0), None, 3)
                cached = model.executable.blocks * model.executable.block_size
                told(name, f"cache tokens, {tokens} in a step", cached)
                for length in FIRST:
                    told(name, f"first token of {length}, {tokens} in a step", bench.first_token(length)["ttft_ms"])
                if tokens != (1024 if stages else 2048):
                    continue
                for workload in asked:
                    result = bench.workload(workload)
                    told(name, str(workload), {key: result.get(key) for key in _KEPT})
                    with timed(model.executable.devices) as found:
                        bench.once(replace(workload, output_len=min(32, workload.output_len)))
                        times = [[device.milliseconds(*pair) for pair in events]
                                 for device, events in zip(model.executable.devices, found, strict=True)]  # fmt: skip
                    told(
                        name, f"{workload}, a graph's milliseconds", [median(each) if each else None for each in times]
                    )
                if stages:
                    model.engine._stages = 1
                    for workload in asked:
                        result = bench.workload(workload)
                        told(
                            "stages, all sequences in one step", str(workload), {key: result.get(key) for key in _KEPT}
                        )


_KEPT = ("output_tokens_per_second", "ttft_ms", "seconds", "decode_step_ms", "decode_step_gpu_ms")


def copies(out: Path) -> None:
    """Microseconds of a copy to the next GPU, of many one behind the other, and of one with its events."""
    from cuda.bindings import driver as cu

    from runtime.cuda.driver import Device, check, count

    here = where()
    first, second = Device(0), Device(1)
    first.reach(second)
    record: dict[str, Any] = {**here, "gpus": count(), "peer": int(check(cu.cuDeviceCanAccessPeer(0, 1)))}
    second.use()
    target = second.allocate(max(SIZES))
    back = second.signal()
    first.use()
    source = first.allocate(max(SIZES))
    there = first.signal()
    for size in SIZES:
        first.push(second, target, source, size)
        start = first.event()
        for _ in range(100):
            first.push(second, target, source, size)
        many = 10 * first.milliseconds(start, first.event())
        start = first.event()
        for _ in range(100):  # there, and back only the word that it arrived
            first.push(second, target, source, size)
            first.mark(there)
            second.use()
            second.follow(there)
            second.mark(back)
            first.use()
            first.follow(back)
        record[str(size)] = {"copy": many, "copy and word back": 10 * first.milliseconds(start, first.event())}
    out.write_text(json.dumps(record, indent=1))
    print(json.dumps(record))
    first.close()
    second.close()


COMMANDS: dict[str, Callable[..., None]] = {
    "equal": lambda path, out: equal(Path(path), Path(out)),
    "speed": lambda path, out, *workloads: speed(Path(path), Path(out), workloads or WORKLOADS),
    "copies": lambda out: copies(Path(out)),
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
