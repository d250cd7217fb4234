"""What each precision costs a trained model: demo/tiny-llama on held-out tokens -> docs/precision.md.

python bench/precision.py                  measure all recipes and write the page (some minutes)
python bench/precision.py w8a16 w4a16_awq  measure these and print; `w8a16+int8` is w8a16 with a KV cache in int8

Calibrated on the first half of calibration-tokens.npy, evaluated on windows of the second half, through the CPU
backend. A copy with planted outliers has the same function: some channels of each norm's gain are 50 times as large,
and the weights that read them as much smaller.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import compiler
import runtime
from compiler.validate.metrics import Agreement, agreement
from specs.hardware import load_toolchain
from specs.precision import load_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo" / "tiny-llama"
PAGE = ROOT / "docs" / "precision.md"
CALIBRATION, WINDOW, WINDOWS = 32_768, 256, 16
PLANTED, FACTOR = 4, 50.0
CACHED = ("fp32", "fp32+int8", "fp32+fp8", "bf16", "bf16+int8", "w4a16", "w4a16+int8")
# What each method is compared with: the same format, rounded to nearest.
BASELINES = {"w4a16_awq": "w4a16_asym", "w4a16_gptq": "w4a16_asym", "w8a8_sq": "w8a8"}


@dataclass(frozen=True)
class Row:
    """One recipe on one checkpoint."""

    recipe: str
    numbers: Agreement
    how: str
    megabytes: float
    seconds: float

    @property
    def perplexity(self) -> float:
        return 0.0 if self.numbers.perplexity is None else self.numbers.perplexity

    @property
    def change(self) -> float:
        """Perplexity over float32's, less 1."""
        reference = self.numbers.reference_perplexity
        return self.perplexity / reference - 1.0 if reference else 0.0


def planted(folder: Path) -> Path:
    """The demo model with outliers in its activations and the same function."""
    target = folder / "planted"
    shutil.copytree(DEMO, target)
    tensors = {name: tensor.float() for name, tensor in load_file(DEMO / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(0)
    readers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for name in [name for name in tensors if name.endswith("layernorm.weight") and ".layers." in name]:
        layer, _, norm = name.removesuffix(".weight").rpartition(".")
        channels = torch.randperm(len(tensors[name]), generator=generator)[:PLANTED]
        tensors[name][channels] *= FACTOR
        for reader in readers[norm]:
            tensors[f"{layer}.{reader}.weight"][:, channels] /= FACTOR
    save_file(tensors, target / "model.safetensors")
    return target


def measure(checkpoint: Path, recipes: tuple[str, ...], folder: Path) -> Iterator[Row]:
    """Rows of the recipes in order, fp32 first whether asked for or not."""
    ids = np.load(DEMO / "calibration-tokens.npy").astype(np.int64)
    calibration = folder / "calibration.npy"
    np.save(calibration, ids[:CALIBRATION])
    starts = range(CALIBRATION, CALIBRATION + WINDOWS * WINDOW, WINDOW)
    rows = [ids[start : start + WINDOW].tolist() for start in starts]
    reference = None
    for name in ("fp32", *(name for name in recipes if name != "fp32")):
        start = time.perf_counter()
        recipe, _, cache = name.partition("+")
        data = calibration if load_recipe(recipe).calibration else None
        bundle = compiler.compile(
            checkpoint, precision=recipe, kv_cache=cache or None, out=folder / "bundle", calibration=data
        )
        seconds = time.perf_counter() - start
        logits = runtime.load(bundle).logits(rows)
        reference = logits if reference is None else reference
        size = sum(path.stat().st_size for path in (bundle / "engine").iterdir()) / 1e6
        yield Row(name, agreement(logits, reference, rows), _how(recipe, cache), size, seconds)


def _how(recipe: str, cache: str) -> str:
    """How the CPU runs a recipe, or keeps a cache."""
    from compiler.precision import decide

    toolchain = load_toolchain("openvino")
    return toolchain.kv_cache[cache].how if cache else str(decide(load_recipe(recipe), toolchain).how)


def table(rows: list[Row]) -> list[str]:
    """The page's table of one checkpoint."""
    lines = ["| precision | perplexity | change | mean KL | relative error | same first token | on the CPU | MB |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        n = row.numbers
        lines.append(
            f"| {row.recipe} | {row.perplexity:.3f} | {100 * row.change:+.2f} % | {n.mean_kl:.5f} | {n.relative:.4f} "
            f"| {100 * n.top1:.1f} % | {row.how} | {row.megabytes:.1f} |"
        )
    return lines


def margins(rows: list[Row]) -> list[str]:
    """How much of its baseline's divergence each method leaves."""
    found = {row.recipe: row for row in rows}
    lines = [
        "| method | baseline | mean KL | baseline's | left | perplexity change | baseline's |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, baseline in BASELINES.items():
        if method in found and baseline in found:
            ours, theirs = found[method], found[baseline]
            kl, before = ours.numbers.mean_kl, theirs.numbers.mean_kl
            lines.append(
                f"| {method} | {baseline} | {kl:.5f} | {before:.5f} | {100 * kl / before:.0f} % "
                f"| {100 * ours.change:+.2f} % | {100 * theirs.change:+.2f} % |"
            )
    return lines


HEAD = f"""# What each precision costs

Written by `python bench/precision.py`; do not edit. The demo model (5.5M parameters, trained), compiled for the CPU and
run by the runtime: calibrated on the first {CALIBRATION:,} tokens of its calibration file, evaluated on
{WINDOWS * WINDOW:,} tokens after them in windows of {WINDOW}. KL, relative error of logits and agreement of the
likeliest token are against fp32. What the recipes are: `specs/precisions/`. How they are run here,
`specs/toolchains/openvino.yaml`: native, the plugin's own kernels on the packed codes; emulate, rounded in float32;
widen, 8 bits in the bundle and float32 in memory; plain, nothing low-bit.

A model this small is harder to quantize than a large one: rows of 256 inputs average little. MB is the engine, of
which the tied embedding and head, not quantized, are 2.1.
"""

CACHES = """
## KV caches in 8 bits

`--kv-cache` with any precision; `native` and `emulate` are said of the cache here.
"""


def main(asked: tuple[str, ...]) -> int:
    """Measure, then print or write."""
    recipes = asked or tuple(name for name in recipe_names() if name != "tf32")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        for row in measure(DEMO, recipes, folder):
            rows.append(row)
            print(table([row])[-1], f"{row.seconds:.0f} s", flush=True)
        spoiled, cached = [], []
        if not asked:
            for row in measure(DEMO, CACHED, folder):
                cached.append(row)
                print(table([row])[-1], f"{row.seconds:.0f} s", flush=True)
            names = tuple(dict.fromkeys([*BASELINES.values(), *BASELINES]))
            for row in measure(planted(folder), names, folder):
                spoiled.append(row)
                print(table([row])[-1], f"{row.seconds:.0f} s", flush=True)
    if not asked:
        lines = [HEAD, *table(rows), "", "## Methods against rounding to nearest, the same bits", "", *margins(rows)]
        lines += [
            "",
            "## With outliers planted",
            "",
            f"{PLANTED} channels of every norm's gain are {FACTOR:g} times as large and the",
        ]
        lines += [
            "weights that read them as much smaller: the same function, harder to round.",
            "",
            *table(spoiled),
            "",
        ]
        lines += margins(spoiled)
        lines += [CACHES, *table(cached)]
        PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:])))
