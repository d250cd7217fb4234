"""Decoding on the CPU over a long context, with the KV cache in the base precision and in 8 bits: speed and memory.

python bench/kv_cache.py    prints the table of docs/speed.md

Of this decoder the cache is most of what is read: 4 layers, 32 heads of 64 for keys and values, 8 sequences of 900
tokens; random weights.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import compiler
import runtime

ROOT = Path(__file__).resolve().parents[1]
PROMPT, NEW, BATCH, LONGEST = 896, 120, 8, 1024
SPEC = ROOT / "specs" / "models" / "llama.yaml"
SIZE = """  long: {d_model: 512, layers: 4, heads: 32, kv_heads: 32, d_head: 64, d_ffn: 1024, vocab: 512, eps: 1.0e-5,
    theta: 10000.0, tied: false, context: 1024, parameters: COUNT}
"""
VARIANTS = (("fp32", None), ("fp32", "int8"), ("bf16", None), ("bf16", "int8"))


def started(bundle: Path) -> runtime.Model:
    """The model with all prompts read: what its engine does next is decoding."""
    model = runtime.load(bundle, cache_tokens=BATCH * LONGEST)
    generator = np.random.default_rng(0)
    requests = [
        model.engine.submit(generator.integers(3, 500, PROMPT).tolist(), max_new_tokens=NEW) for _ in range(BATCH)
    ]
    while not all(request.new for request in requests):
        model.engine.step()
    return model


def main() -> None:
    """Variants take turns step by step, so that what else the machine does meets all of them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = folder / SPEC.name
        count = 2 * 512 * 512 + 4 * (4 * 512 * 2048 + 3 * 512 * 1024 + 2 * 512) + 512
        spec.write_text(SPEC.read_text() + SIZE.replace("COUNT", str(count)))
        models = {}
        for precision, cache in VARIANTS:
            bundle = compiler.compile(
                spec, size="long", precision=precision, kv_cache=cache, weights="random", max_batch=BATCH,
                max_sequence=LONGEST, out=folder / f"{precision}-{cache}",
            )  # fmt: skip
            models[precision, cache] = started(bundle)
        seconds: dict[tuple[str, str | None], list[float]] = {key: [] for key in models}
        for _ in range(NEW - 8):
            for key, model in models.items():
                start = time.perf_counter()
                model.engine.step()
                seconds[key].append(time.perf_counter() - start)
    print("| precision | KV cache | cache, MB | decode step, ms, median (10 to 90 %) | speed against its own |")
    print("|---|---|---|---|---|")
    for (precision, cache), samples in seconds.items():
        low, middle, high = (1e3 * float(x) for x in np.quantile(samples, (0.1, 0.5, 0.9)))
        ratio = statistics.median(seconds[precision, None]) * 1e3 / middle
        size = models[precision, cache].executable.cache_bytes / 1e6
        step = f"{middle:.1f} ({low:.1f}-{high:.1f})"
        print(f"| {precision} | {cache or precision} | {size:,.0f} | {step} | {ratio:.2f}x |")


if __name__ == "__main__":
    main()
