"""Our calibration beside that of libraries: the demo model, the same tokens for both, the same held-out evaluation.

python bench/libraries.py [NAME ...]     measure and write docs/libraries.md (some minutes), or print those named

Needs nvidia-modelopt, auto-round and transformers, which SpecRT itself does not; into a folder of their own, so that
PyTorch stays the one that is there:

    pip install --no-deps --target FOLDER nvidia-modelopt nvidia-ml-py omegaconf antlr4-python3-runtime==4.9.3 pulp \\
        scipy auto-round accelerate datasets pyarrow dill xxhash multiprocess pandas python-dateutil pytz tzdata \\
        py-cpuinfo aiohttp psutil loguru fsspec
    LIBRARIES=FOLDER python bench/libraries.py

A library's model is run by transformers in float32 with the library's own rounding of weights and activations; ours is
the bundle, run by the runtime. Both are held against the same float32 logits by the same code.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compiler.validate.metrics import Agreement, agreement
from precision import CALIBRATION, DEMO, ROOT, WINDOW, WINDOWS, measure

PAGE = ROOT / "docs" / "libraries.md"
BATCH = 16  # windows that a library sees together
LENGTH = 512  # of a calibration window, as in our recipes
SHORT = {"down_proj": 64}  # a group of 128 does not divide its 704 inputs; our recipes then take 64


@dataclass(frozen=True)
class Contest:
    """One method of a library and the recipe of ours that stores and computes the same."""

    name: str
    library: str
    recipe: str
    run: Callable[[Any, torch.Tensor], Any]
    note: str


def _modelopt(name: str, algorithm: Any = None, group: int | None = None) -> Callable[[Any, torch.Tensor], Any]:
    def run(model: Any, windows: torch.Tensor) -> Any:
        import copy

        import modelopt.torch.quantization as mtq

        config = copy.deepcopy(getattr(mtq, name))
        if algorithm is not None:
            config["algorithm"] = algorithm
        if group is not None:
            for module, size in SHORT.items():
                blocks = {"num_bits": 4, "block_sizes": {-1: size, "type": "static"}}
                config["quant_cfg"].append({"quantizer_name": f"*{module}*weight_quantizer", "cfg": blocks})

        def forward(quantized: Any) -> None:
            for batch in torch.split(windows, BATCH):
                quantized(batch)

        return mtq.quantize(model, config, forward)

    return run


def _auto_round(symmetric: bool) -> Callable[[Any, torch.Tensor], Any]:
    def run(model: Any, windows: torch.Tensor) -> Any:
        from auto_round import AutoRound
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DEMO / "tokenizer.json"))
        layers = {
            name: {"group_size": size}
            for name, _ in model.named_modules() for module, size in SHORT.items() if name.endswith(module)
        }  # fmt: skip
        data = [{"input_ids": window[None], "attention_mask": torch.ones_like(window[None])} for window in windows]
        tuner = AutoRound(
            model, tokenizer, scheme="W4A16", sym=symmetric, group_size=128, layer_config=layers, dataset=data,
            nsamples=len(windows), seqlen=LENGTH, iters=ITERATIONS, batch_size=8, device_map="cpu",
            enable_torch_compile=False, seed=0,
        )  # fmt: skip
        return tuner.quantize()[0]

    return run


ITERATIONS = 200
MODELOPT, ROUND = "nvidia-modelopt", "auto-round"
_SYMMETRIC = "symmetric; ours has zero points"
_STATIC = "static, a scale for all inputs"
_FULL = {"method": "awq_full", "alpha_step": 0.1}
CONTESTS = (
    Contest(
        "modelopt INT4 max", MODELOPT, "w4a16", _modelopt("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", group=128), "symmetric"
    ),
    Contest("modelopt INT4 AWQ", MODELOPT, "w4a16_awq", _modelopt("INT4_AWQ_CFG", group=128), _SYMMETRIC),
    Contest("modelopt INT4 AWQ, clipped", MODELOPT, "w4a16_awq", _modelopt("INT4_AWQ_CFG", _FULL, 128), _SYMMETRIC),
    Contest("auto-round W4A16", ROUND, "w4a16_gptq", _auto_round(True), _SYMMETRIC),
    Contest("auto-round W4A16, zeros", ROUND, "w4a16_gptq", _auto_round(False), "zero points"),
    Contest("modelopt INT8 SmoothQuant", MODELOPT, "w8a8_sq_static", _modelopt("INT8_SMOOTHQUANT_CFG"), _STATIC),
    Contest("modelopt FP8", MODELOPT, "fp8", _modelopt("FP8_DEFAULT_CFG"), _STATIC),
)


def _model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


def _logits(model: Any, rows: list[list[int]]) -> list[np.ndarray]:
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0].float().numpy() for row in rows]


def theirs(contests: tuple[Contest, ...]) -> Iterator[tuple[Contest, Agreement, float]]:
    """Each library's method on the demo model: its divergence from float32, and seconds."""
    ids = np.load(DEMO / "calibration-tokens.npy").astype(np.int64)
    windows = torch.from_numpy(ids[:CALIBRATION].reshape(-1, LENGTH))
    starts = range(CALIBRATION, CALIBRATION + WINDOWS * WINDOW, WINDOW)
    rows = [ids[start : start + WINDOW].tolist() for start in starts]
    reference = _logits(_model(), rows)
    for contest in contests:
        start = time.perf_counter()
        model = contest.run(_model(), windows)
        seconds = time.perf_counter() - start
        yield contest, agreement(_logits(model, rows), reference, rows), seconds


def _line(name: str, numbers: Agreement, seconds: float, note: str) -> str:
    change = 100 * ((numbers.perplexity or 0.0) / (numbers.reference_perplexity or 1.0) - 1)
    return f"| {name} | {numbers.mean_kl:.5f} | {change:+.2f} % | {100 * numbers.top1:.1f} % | {seconds:.0f} | {note} |"


def main(asked: tuple[str, ...]) -> int:
    """Measure, then print or write."""
    if "LIBRARIES" in os.environ:
        sys.path.append(os.environ["LIBRARIES"])
    contests = tuple(contest for contest in CONTESTS if not asked or any(name in contest.name for name in asked))
    lines = []
    for contest, numbers, seconds in theirs(contests):
        lines.append(_line(contest.name, numbers, seconds, contest.note))
        print(lines[-1], flush=True)
    with tempfile.TemporaryDirectory() as name:
        recipes = tuple(dict.fromkeys(contest.recipe for contest in contests))
        for row in measure(DEMO, recipes, Path(name)):
            if row.recipe != "fp32":
                lines.append(_line(f"**{row.recipe}**", row.numbers, row.seconds, "ours"))
                print(lines[-1], flush=True)
    if not asked:
        used = ", ".join(f"{name} {version(name)}" for name in dict.fromkeys(contest.library for contest in contests))
        head = ["| method | mean KL | perplexity change | same first token | seconds | |", "|---|---|---|---|---|---|"]
        PAGE.write_text("\n".join([HEAD.format(used), *head, *lines]) + "\n", encoding="utf-8")
    return 0


HEAD = f"""# Our calibration beside libraries

Written by `python bench/libraries.py`; do not edit. {{}}, with the settings that they come with but for the groups of
one linear, whose inputs 128 does not divide: 64 there, as in ours. The demo model, {CALIBRATION:,} calibration tokens
for all, {WINDOWS * WINDOW:,} held-out tokens in windows of {WINDOW}. Divergence is from float32; seconds are of one run
on 2 shared cores, for ours with writing the bundle.
"""


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:])))
