"""Our calibration beside that of libraries: the demo model, the same tokens for both, the same held-out evaluation.

python bench/libraries.py            measure what bench/results/libraries.json lacks (of everything, half an hour)
python bench/libraries.py NAME ...   measure these methods or recipes anew

Each number is kept at once; when none is missing docs/libraries.md is written.

Needs nvidia-modelopt, auto-round and transformers, which SpecRT itself does not; into a folder of their own, so that
PyTorch stays the one that is there:

    pip install --no-deps --target FOLDER nvidia-modelopt nvidia-ml-py omegaconf antlr4-python3-runtime==4.9.3 pulp \\
        scipy auto-round accelerate datasets pyarrow dill xxhash multiprocess pandas python-dateutil pytz tzdata \\
        py-cpuinfo aiohttp psutil loguru fsspec
    LIBRARIES=FOLDER python bench/libraries.py

llm-compressor wants other versions of transformers and of what that needs, in a folder of their own which goes first:

    pip install --no-deps --target OTHER llmcompressor==0.14.0.1 transformers==5.17.0 compressed-tensors==0.19.0 \\
        auto-round==0.15.1 'huggingface-hub<2' httpx httpcore h11 anyio certifi idna sniffio pillow requests
    LIBRARIES=OTHER:FOLDER python bench/libraries.py "llm-compressor FP8" ...
    LIBRARIES=FOLDER:OTHER python bench/libraries.py    (then writes the page, with the versions of FOLDER)

A library's model is run by transformers in float32 with the library's own rounding of weights and activations; ours is
the bundle, run by the runtime. Both are held against the same float32 logits by the same code. All is done twice,
on either half of the calibration file and held out on the other; the spread is that over windows.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import compiler
import runtime
from precision import DEMO, ROOT, WINDOW
from specs.precision import load_recipe

PAGE, KEPT = ROOT / "docs" / "libraries.md", ROOT / "bench" / "results" / "libraries.json"
HALF = 32_768  # tokens to calibrate on; the other half is held out
HALVES = ("0", "1")
BATCH = 16  # windows that run together
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


def _llm_compressor(modifiers: Callable[[Callable[..., Any]], list[Any]]) -> Callable[[Any, torch.Tensor], Any]:
    def run(model: Any, windows: torch.Tensor) -> Any:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor import oneshot

        def groups(symmetric: bool) -> dict[str, Any]:
            def of(size: int, *modules: str) -> Any:
                how = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=size)
                return QuantizationScheme(targets=[f"re:.*({'|'.join(modules)})$"], weights=how)

            names = {name.rpartition(".")[2] for name, _ in model.named_modules() if name.endswith("_proj")}
            short = {module: of(size, module) for module, size in SHORT.items()}
            return {"config_groups": {**short, "other": of(128, *sorted(names - set(SHORT)))}, "ignore": ["lm_head"]}

        data: Any = [{"input_ids": window[None], "attention_mask": torch.ones_like(window[None])} for window in windows]
        loader: Any = torch.utils.data.DataLoader(data, batch_size=None)
        count = len(windows)
        return oneshot(
            model=model, dataset=loader, recipe=modifiers(groups), max_seq_length=LENGTH, num_calibration_samples=count
        )  # fmt: skip

    return run


def _gptq(groups: Callable[..., Any]) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier

    return [GPTQModifier(**groups(symmetric=False))]


def _smoothed(_: Callable[..., Any]) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    return [
        SmoothQuantModifier(smoothing_strength=0.8),
        GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
    ]


def _fp8(_: Callable[..., Any]) -> list[Any]:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return [QuantizationModifier(targets="Linear", scheme="FP8", ignore=["lm_head"])]


ITERATIONS = 200
MODELOPT, ROUND, COMPRESSOR = "nvidia-modelopt", "auto-round", "llmcompressor"
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
    Contest("llm-compressor GPTQ", COMPRESSOR, "w4a16_gptq", _llm_compressor(_gptq), "zero points"),
    Contest("llm-compressor W8A8", COMPRESSOR, "w8a8_sq", _llm_compressor(_smoothed), "SmoothQuant and GPTQ, by token"),
    Contest("llm-compressor FP8", COMPRESSOR, "fp8", _llm_compressor(_fp8), _STATIC),
)


Logits = Callable[[list[list[int]]], torch.Tensor]


@dataclass(frozen=True)
class Score:
    """Of one method on the windows of one half or both: KL from float32 and loss over float32's, a number a window."""

    kl: list[float]
    loss: list[float]
    same: float  # share of tokens whose likeliest next token is float32's
    seconds: float | None  # of CPU time for calibration

    def line(self, name: str, note: str) -> str:
        """Its row of the page."""
        seconds = "" if self.seconds is None else f"{self.seconds:.0f}"
        change = f"{_spread(self.loss, 100):+.2f} %"
        return f"| {name} | {_spread(self.kl):.5f} | {change} | {100 * self.same:.1f} % | {seconds} | {note} |"


class _spread:  # noqa: N801 (a number with its standard error)
    def __init__(self, values: Sequence[float], factor: float = 1.0) -> None:
        self.mean = factor * float(np.mean(values))
        self.error = factor * float(np.std(values)) / len(values) ** 0.5

    def __format__(self, form: str) -> str:
        return f"{self.mean:{form}} ± {self.error:{form.lstrip('+')}}"


def _model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


class Half:
    """Calibrates on one half of the file and evaluates on the other."""

    def __init__(self, number: int) -> None:
        halves = np.load(DEMO / "calibration-tokens.npy").astype(np.int64).reshape(2, HALF)
        self.tokens, self.rows = halves[number], halves[1 - number].reshape(-1, WINDOW).tolist()
        self.reference = list(self.batches(_by_transformers(_model())))

    def batches(self, logits: Logits) -> Iterator[torch.Tensor]:
        """Log-probabilities [BATCH, WINDOW, vocab]."""
        with torch.no_grad():
            for start in range(0, len(self.rows), BATCH):
                yield torch.log_softmax(logits(self.rows[start : start + BATCH]), -1)

    def score(self, logits: Logits, seconds: float) -> Score:
        """Logits against float32's."""
        kl, loss, same = [], [], []
        for number, (q, p) in enumerate(zip(self.batches(logits), self.reference, strict=True)):
            following = torch.tensor(self.rows[number * BATCH : (number + 1) * BATCH])[:, 1:, None]
            kl += (p.exp() * (p - q)).sum(-1).mean(-1).tolist()
            loss += (p - q)[:, :-1].gather(-1, following).mean((-2, -1)).tolist()
            same.append(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
        return Score([round(x, 8) for x in kl], [round(x, 8) for x in loss], float(np.mean(same)), round(seconds, 1))

    def theirs(self, contest: Contest) -> Score:
        """A library's method."""
        start = time.process_time()
        model = contest.run(_model(), torch.from_numpy(self.tokens.reshape(-1, LENGTH)))
        return self.score(_by_transformers(model), time.process_time() - start)

    def ours(self, recipe: str) -> Score:
        """A recipe, which looks at the same tokens."""
        with tempfile.TemporaryDirectory() as name:
            folder, start = Path(name), time.process_time()
            np.save(folder / "ids.npy", self.tokens)
            asked = load_recipe(recipe).calibration
            assert asked is None or asked.windows * asked.length == HALF
            data = None if asked is None else folder / "ids.npy"
            bundle = compiler.compile(DEMO, precision=recipe, out=folder / "bundle", calibration=data)
            seconds = time.process_time() - start
            model = runtime.load(bundle)
            return self.score(lambda rows: torch.from_numpy(np.stack(model.logits(rows))).float(), seconds)


def _by_transformers(model: Any) -> Logits:
    return lambda rows: model(torch.tensor(rows)).logits.float()


def _kept() -> dict[str, dict[str, Score]]:
    content = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    return {name: {half: Score(**score) for half, score in halves.items()} for name, halves in content.items()}


def _keep(kept: dict[str, dict[str, Score]]) -> None:
    """One line for each method."""
    content = {name: {half: asdict(score) for half, score in halves.items()} for name, halves in kept.items()}
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(halves)}" for name, halves in content.items())
    KEPT.write_text(f"{{\n{rows}\n}}\n", encoding="utf-8")


def _both(by_half: dict[str, Score]) -> Score:
    halves = [by_half[name] for name in HALVES]
    known = [half.seconds for half in halves if half.seconds is not None]
    return Score(
        [x for half in halves for x in half.kl], [x for half in halves for x in half.loss],
        float(np.mean([half.same for half in halves])), float(np.mean(known)) if known else None,
    )  # fmt: skip


def page(kept: dict[str, dict[str, Score]]) -> list[str]:
    """The lines of docs/libraries.md."""
    used = ", ".join(f"{name} {version(name)}" for name in dict.fromkeys(contest.library for contest in CONTESTS))
    lines = [HEAD.format(used), "| method | mean KL | perplexity change | same first token | CPU seconds | |"]
    lines.append("|---|---|---|---|---|---|")
    scores = {name: _both(halves) for name, halves in kept.items()}
    lines += [scores[contest.name].line(contest.name, contest.note) for contest in CONTESTS]
    recipes = dict.fromkeys(contest.recipe for contest in CONTESTS)
    lines += [scores[recipe].line(f"**{recipe}**", "ours") for recipe in recipes]
    lines += [PAIRS, "| ours | library | KL, ours less theirs | perplexity, ours less theirs |", "|---|---|---|---|"]
    for contest in CONTESTS:
        ours, library = scores[contest.recipe], scores[contest.name]
        kl = _spread(np.subtract(ours.kl, library.kl).tolist())
        loss = _spread(np.subtract(ours.loss, library.loss).tolist(), 100)
        lines.append(f"| {contest.recipe} | {contest.name} | {kl:+.5f} | {loss:+.2f} % |")
    return lines


def main(asked: tuple[str, ...]) -> int:
    """Measure, keep and write."""
    if "LIBRARIES" in os.environ:
        sys.path[:0] = os.environ["LIBRARIES"].split(os.pathsep)
    names = [contest.name for contest in CONTESTS] + list(dict.fromkeys(contest.recipe for contest in CONTESTS))
    wanted = [name for name in names if not asked or name in asked]
    if unknown := set(asked) - set(names):
        print(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(names)}", file=sys.stderr)
        return 2
    contests, kept = {contest.name: contest for contest in CONTESTS}, _kept()
    for number in HALVES:
        missing = [name for name in wanted if asked or number not in kept.get(name, {})]
        half = Half(int(number)) if missing else None
        for name in missing:
            assert half is not None
            score = half.theirs(contests[name]) if name in contests else half.ours(name)
            kept.setdefault(name, {})[number] = score
            _keep(kept)
            print(number, score.line(name, ""), flush=True)
    lacking = [name for name in names if set(kept.get(name, {})) < set(HALVES)]
    if lacking:
        print(f"the page is not written yet, these are missing: {', '.join(lacking)}")
        return 1
    PAGE.write_text("\n".join(page(kept)) + "\n", encoding="utf-8")
    return 0


HEAD = f"""# Our calibration beside libraries

Written by `python bench/libraries.py`; do not edit. {{}}, with the settings that they come with but for the groups of
one linear, whose inputs 128 does not divide: 64 there, as in ours. The demo model, {HALF:,} calibration tokens for
all, {HALF:,} held-out tokens in windows of {WINDOW}; then the same with the halves exchanged. Means over the windows of
both, ± is the standard error. Divergence is from float32; perplexity's change is the mean change of the loss. Seconds
are CPU time of one calibration, for ours with writing the bundle; empty where the machine was too busy to say.
llm-compressor's AWQ is left out: it pins memory for an accelerator, without one it ends with an error.
"""
PAIRS = """
## Window by window

The same windows for both, so that what is hard about a text drops out; below zero, ours is nearer to float32.
"""


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:])))
