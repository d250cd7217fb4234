"""Decode steps of kernels alone on a real GPU: with overlapping launches and without, the same bits in how much time.

python bench/gpu_layer.py compile FOLDER    anywhere: bundles of a 7B shape (triton)
python bench/gpu_layer.py run FOLDER OUT    where the GPU is: checks and times into OUT (cuda-bindings; no TensorRT)
python bench/gpu_layer.py once FOLDER RECIPE    one step of a row outside of a graph, for a profiler

The whole runtime runs; segments that have an engine beside their kernels are computed by these.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

RECIPES = ("w4a16", "fp8_rowwise", "fp16")
COUNTS = (1, 16, 64)
CONTEXT = 512  # tokens of each sequence
LENGTHS = (CONTEXT // 2, CONTEXT)  # what is computed in turn, so that a result of the call before is a wrong one
REPEATS = 25  # of each check of bits


def compile_all(folder: Path) -> None:
    """A bundle for each recipe, with random weights."""
    import compiler
    from compiler.kernels import library

    library.SIZES = COUNTS  # type: ignore[attr-defined, assignment]
    spec = Path(__file__).resolve().parent.parent / "specs" / "models" / "llama.yaml"
    for recipe in RECIPES:
        compiler.compile(
            spec, size="7b", target="sm90", toolchain="tensorrt-8.6", precision=recipe, weights="random",
            max_batch=max(COUNTS), max_sequence=2 * CONTEXT, out=folder / recipe,
        )  # fmt: skip


class Unused:
    """In place of an engine: kernels do what it would."""

    dynamic = ()


class Engines(dict[str, Unused]):
    """For every engine of a plan."""

    memory = 0

    def __init__(self, bundle: Any, device: Any) -> None:
        del device
        super().__init__({step.file: Unused() for step in bundle.program.steps if step.kind == "engine"})

    def close(self) -> None:
        """Nothing is held."""


def opened(path: Path) -> Any:
    """The executable of a bundle whose every segment runs as kernels."""
    from runtime.bundle import Bundle
    from runtime.cuda import executable
    from runtime.cuda.graphs import Ways
    from runtime.cuda.steps import program_step

    class Steps(executable.CUDAExecutable):
        def _ways_of(self, memory: Any) -> Ways:
            ways = super()._ways_of(memory)
            kinds = [step.kind for step in self._program.steps]
            assert all(rows or kind != "engine" for kind, rows in zip(kinds, ways.rows, strict=True))
            plain = [program_step(rows) if rows else one for one, rows in zip(ways.plain, ways.rows, strict=True)]
            return Ways(plain, [{} for _ in plain])

        def _caches(self) -> dict[str, int]:
            found = super()._caches()
            numbers = np.random.default_rng(1).standard_normal(1 << 22).astype(np.float16)
            assert self._program.cache is not None
            (row,) = {layer.heads * layer.dim for layer in self._program.cache.layers}
            size = 2 * row * self.block_size * self.blocks
            for address in found.values():
                for at in range(0, size, numbers.nbytes):
                    self.device.upload(address + at, numbers, min(numbers.nbytes, size - at))
            self.device.wait()
            return found

    executable._engines = Engines  # type: ignore[assignment]
    return Steps(Bundle.open(path), tokens=max(COUNTS), cache_tokens=max(COUNTS) * CONTEXT)


def batch_of(made: Any, count: int, context: int = CONTEXT) -> dict[str, Any]:
    """Sequences that each get the token behind `context` - 1 others."""
    blocks = context // made.block_size
    ids = np.arange(count * blocks, dtype=np.int32)
    ones = np.ones(count, np.int32)
    known = {
        "tokens": ones, "positions": ones * (context - 1), "past_lens": ones * (context - 1),
        "seq_begins": np.arange(count + 1, dtype=np.int32), "block_ids": ids,
        "block_begins": np.arange(count + 1, dtype=np.int32) * blocks,
        "max_context": np.array(context, np.int32), "select": np.arange(count, dtype=np.int32),
    }  # fmt: skip
    return {port.name: known[port.name] for port in made._program.inputs}


def milliseconds(made: Any, shape: Any, rounds: int = 30) -> float:
    """The median of replays of a captured step."""
    device, graph = made.device, made.graphs[shape][0]
    found: list[float] = []
    for _ in range(rounds):
        start = device.event()
        device.replay(graph)
        found.append(device.milliseconds(start, device.event()))
    return statistics.median(found)


def one_recipe(path: Path) -> dict[str, Any]:
    """Milliseconds of a step by rows, without overlap and with it, and whether all results are the same."""
    from runtime.cuda.batch import Shape
    from runtime.cuda.graphs import Graphs

    made = opened(path)
    found: dict[str, Any] = {"chosen": made.graphs.choices}
    read = sum(weight.bytes for name, weight in made._program.weights.items() if not name.startswith("embed"))
    ways = {name: Graphs(made.device, made._program, made._ways) for name in ("alone", "overlap")}
    for name, graphs in ways.items():
        graphs.trials = (name == "overlap",)
    for count in COUNTS:
        batches, shape = [batch_of(made, count, length) for length in LENGTHS], Shape(count, count, count, count, 0)
        result: dict[str, Any] = {"weights GB": read / 1e9}
        expected: list[Any] = []
        for name in ("alone", "overlap", "alone again", "overlap again"):
            made.graphs = ways[name.split()[0]]
            if made.graphs[shape] is None:
                made._capture(shape, made._turns.take())
            expected = expected or [made.execute(batch)["logits"].copy() for batch in batches]
            same = sum(
                np.array_equal(made.execute(batch)["logits"], logits)
                for _ in range(REPEATS)
                for batch, logits in zip(batches, expected, strict=True)
            )
            result[name] = {"ms": milliseconds(made, shape), "same bits": f"{same} of {2 * REPEATS}"}
        result["finite"] = all(bool(np.isfinite(logits).all()) for logits in expected)
        result["unlike each other"] = not np.array_equal(*expected)
        best = min(result[name]["ms"] for name in ("overlap", "overlap again"))
        result["GB/s"] = read / best / 1e6
        found[str(count)] = result
        print(path.name, count, json.dumps(result), flush=True)
    made.close()
    return found


def run_all(folder: Path, out: Path) -> None:
    """Every recipe that was compiled; OUT gets everything as JSON after each."""
    result: dict[str, Any] = {"context": CONTEXT, "recipes": {}}
    for recipe in RECIPES:
        if (folder / recipe).is_dir():
            result["recipes"][recipe] = one_recipe(folder / recipe)
            out.write_text(json.dumps(result, indent=1))


def once(path: Path) -> None:
    """A step of one row, launch by launch."""
    made = opened(path)
    made._sizes = []  # no batch has a graph
    for _ in range(2):
        made.execute(batch_of(made, 1))
    made.close()


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        compile_all(Path(sys.argv[2]))
    elif sys.argv[1] == "once":
        once(Path(sys.argv[2]) / sys.argv[3])
    else:
        run_all(Path(sys.argv[2]), Path(sys.argv[3]))
