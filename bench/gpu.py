"""The GPU runtime on a real GPU: right first, then as fast as what. Needs TensorRT, cuda-bindings, numpy; no PyTorch.

python bench/gpu.py reference CHECKPOINT EXPECTED.npz    where transformers is: what `check` compares with
python bench/gpu.py check BUNDLE EXPECTED.npz OUT.json    logits, greedy ids, in-flight batching
python bench/gpu.py speed BUNDLE OUT.json [INxOUTxBATCH ...]    `specrt bench`, each workload once
python bench/gpu.py profile BUNDLE OUT.json TOKENS ...    milliseconds of TensorRT's layers
python bench/gpu.py steps BUNDLE OUT.json TOKENS ...    of a prompt: the host, each kind of step, as a graph
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu_build import build
from gpu_serving import COUNT, arrivals, drawn, memcheck, soak
from gpu_steps import steps

PROMPTS = (1, 7, 40, 130, 300)  # tokens
NEW = 48
BEAMS = 4
WORKLOADS = ("128x128x1", "128x128x64", "2048x128x64", "128x2048x64", "2048x2048x32")


def reference(checkpoint: Path, out: Path) -> None:
    """Logits in float32 and float16, greedy ids and what beams find for fixed prompts, by transformers on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    models = {
        bits: AutoModelForCausalLM.from_pretrained(checkpoint, dtype=kind).eval()
        for bits, kind in ((32, torch.float32), (16, torch.float16))
    }
    generator = np.random.default_rng(0)
    vocab = models[32].config.vocab_size
    arrays: dict[str, Any] = {}
    for number, length in enumerate(PROMPTS):
        prompt = generator.integers(0, vocab, length)
        given = torch.tensor(prompt[None])
        arrays[f"p{number}"] = prompt.astype(np.int32)
        with torch.no_grad():
            for bits, model in models.items():
                arrays[f"l{bits}_{number}"] = model(given).logits[0].float().numpy()
            how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            ids = models[32].generate(given, **how)
            how |= {"output_scores": True, "return_dict_in_generate": True}
            searched = models[32].generate(given, num_beams=BEAMS, num_return_sequences=BEAMS, **how)
        arrays[f"g{number}"] = ids[0, length:].numpy().astype(np.int32)
        arrays[f"b{number}"] = searched.sequences[:, length:].numpy().astype(np.int32)
        arrays[f"s{number}"] = searched.sequences_scores.numpy()
    np.savez_compressed(out, **arrays)


def where() -> dict[str, Any]:
    """The GPU, its driver, its bandwidth, TensorRT and the date."""
    from compiler.benchmark import gpu

    return {**gpu(), "date": time.strftime("%Y-%m-%d")}


def check(bundle: Path, expected: Path, out: Path) -> None:
    """Compare with the reference; all numbers go to OUT."""
    import runtime
    from compiler.benchmark import built

    arrays = np.load(expected)
    count = sum(name.startswith("p") for name in arrays)
    prompts = [arrays[f"p{i}"].tolist() for i in range(count)]
    result: dict[str, Any] = {**where(), "bundle": bundle.name, "build": built(bundle)}
    with runtime.load(bundle) as model:
        result["precision"] = model.bundle.manifest["precision"]
        logits = model.logits(prompts)
        own = [float(np.abs(logits[i] - arrays[f"l32_{i}"]).max()) for i in range(count)]
        theirs = [float(np.abs(arrays[f"l16_{i}"] - arrays[f"l32_{i}"]).max()) for i in range(count)]
        result |= {"error": own, "error of the reference in float16": theirs}
        together = model.generate(prompts, max_new_tokens=NEW, stop=())
        alone = [model.generate([prompt], max_new_tokens=NEW, stop=())[0] for prompt in prompts]
        drawn = model.generate(prompts, max_new_tokens=NEW, stop=(), temperature=0.8, top_k=20, seed=1)
        result["greedy equal"] = [together[i] == arrays[f"g{i}"].tolist() for i in range(count)]
        result["alone equal"] = [together[i] == alone[i] for i in range(count)]
        result["drawn again equal"] = drawn == model.generate(
            prompts, max_new_tokens=NEW, stop=(), temperature=0.8, top_k=20, seed=1
        )
        result["arriving over time equal"] = arriving(model, prompts, together)
        result["beams"] = searching(model, prompts, arrays)
        result["choices"] = model.executable.choices  # type: ignore[attr-defined]
    result["bytes not given back"] = not_given_back(bundle)
    out.write_text(json.dumps(result, indent=1))
    print(json.dumps({key: value for key, value in result.items() if key != "choices"}))


def searching(model: Any, prompts: Sequence[list[int]], arrays: Any) -> dict[str, Any]:
    """What beam search finds of all prompts together: ids against the reference's, the greatest error of a score."""
    found = model.search(prompts, num_beams=BEAMS, num_return_sequences=BEAMS, max_new_tokens=NEW, stop=())
    return {
        "beams": BEAMS,
        "ids equal": [[one.ids for one in best] == arrays[f"b{i}"].tolist() for i, best in enumerate(found)],
        "error of scores": max(
            abs(one.score - s) for i, best in enumerate(found) for one, s in zip(best, arrays[f"s{i}"], strict=True)
        ),
    }


def arriving(model: Any, prompts: Sequence[list[int]], expected: Sequence[list[int]]) -> bool:
    """Whether 64 requests that arrive while others run give what each gave before."""
    engine = model.engine
    requests = []
    for number in range(64):
        requests.append(engine.submit(prompts[number % len(prompts)], max_new_tokens=NEW))
        for _ in range(number % 3):
            engine.step()
    while engine.busy:
        engine.step()
    return all(request.new == expected[i % len(prompts)] for i, request in enumerate(requests))


def not_given_back(bundle: Path) -> int:
    """Bytes that three times loading and closing leave in use on the GPU."""
    import runtime
    from runtime.cuda.driver import Device

    device = Device()
    runtime.load(bundle, cache_tokens=1024).close()  # loads what the driver keeps
    before = device.used_memory
    for _ in range(3):
        runtime.load(bundle, cache_tokens=1024).close()
    device.use()
    left = device.used_memory - before
    device.close()
    return left


def speed(bundle: Path, out: Path, workloads: Sequence[str]) -> None:
    """`specrt bench` with one run of each, for long workloads; OUT is written after each."""
    from compiler.benchmark import benchmark, read_workload

    def told(record: dict[str, Any]) -> None:
        out.write_text(json.dumps(record, indent=1))
        print(json.dumps((record["workloads"] or record["first_token"])[-1]), flush=True)

    benchmark(bundle, [read_workload(text) for text in workloads], runs=1, told=told)


def profile(bundle: Path, out: Path, sizes: Sequence[str]) -> None:
    """Milliseconds of each TensorRT layer of each segment for prompts of these sizes, most first."""
    import tensorrt

    import runtime
    from compiler.benchmark import built

    class Times(tensorrt.IProfiler):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.IProfiler.__init__(self)
            self.found: dict[str, float] = {}

        def report_layer_time(self, name: str, milliseconds: float) -> None:
            self.found[name] = self.found.get(name, 0.0) + milliseconds

    result: dict[str, Any] = {**where(), "bundle": bundle.name, "build": built(bundle)}
    with runtime.load(bundle, verify=False) as model:
        generator = np.random.default_rng(1)
        for size in map(int, sizes):
            for round_ in range(2):
                kept = []
                if round_:
                    engines: Any = model.executable
                    for file, engine in engines._engines._engines.items():
                        for (number, _), (context, _) in engine._contexts.items():
                            context.profiler = Times()
                            kept.append((f"{file} profile {number}", context.profiler))
                model.engine.submit(generator.integers(0, model.vocab, size).tolist(), max_new_tokens=1)
                model.engine.step()
            result[str(size)] = {
                name: {
                    "total": sum(times.found.values()),
                    "layers": dict(sorted(times.found.items(), key=lambda item: -item[1])[:25]),
                }
                for name, times in kept
                if times.found
            }
            print(size, {name: round(entry["total"], 3) for name, entry in result[str(size)].items()}, flush=True)
            out.write_text(json.dumps(result, indent=1))


COMMANDS: dict[str, Callable[..., None]] = {
    "reference": lambda checkpoint, out: reference(Path(checkpoint), Path(out)),
    "check": lambda bundle, expected, out: check(Path(bundle), Path(expected), Path(out)),
    "speed": lambda bundle, out, *workloads: speed(Path(bundle), Path(out), workloads or WORKLOADS),
    "profile": lambda bundle, out, *sizes: profile(Path(bundle), Path(out), sizes),
    "steps": lambda bundle, out, *sizes: steps(Path(bundle), Path(out), [int(size) for size in sizes]),
    "arrivals": lambda bundle, out, count=COUNT: arrivals(Path(bundle), Path(out), int(count)),
    "drawn": lambda bundle, out: drawn(Path(bundle), Path(out)),
    "soak": lambda bundle, out, seconds: soak(Path(bundle), Path(out), float(seconds)),
    "memcheck": lambda bundle, out: memcheck(Path(bundle), Path(out)),
    "build": lambda bundle, out: build(Path(bundle), Path(out)),
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
