"""Every family is judged alike: a checkpoint, what the reference computes on it, and the bundle compiled from it.

Tolerance 2e-4 absolute on float32 logits: the pass mark of the reference cases (tests/data/reference/INDEX.md), whose
own noise, float32 against float64 and eager against sdpa, is 1e-5.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

import compiler
import runtime
from compiler.ir.core import Graph, walk
from compiler.passes.fuse_attention import over_tokens
from tests.families.evidence import record

TOLERANCE = 2e-4
NEW_IDS = 16
ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "tests" / "data" / "reference"
GOLDENS = ROOT / "tests" / "golden" / "models"

_PLACE = re.compile(r" @ \S+$", re.M)

Logits = Callable[[list[int]], np.ndarray]  # tokens -> float32 [len, vocab]


def save_random(
    model: Any,
    folder: Path,
    *,
    seed: int = 11,
    dtype: torch.dtype = torch.float32,
    attention: str = "eager",
    **options: Any,
) -> Any:
    """Give a transformers model weights large enough that logits differ clearly, save it, load it back in float32.

    Matrices get deviation 0.2, gains 1 +- 0.3 (around the 1 or 0 that the model starts them with), other vectors 0.3.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            constant = parameter.ndim == 1 and bool((parameter == parameter.flatten()[0]).all())
            base = float(parameter.flatten()[0]) if constant else 0.0
            parameter.copy_(base + noise * (0.2 if parameter.ndim > 1 else 0.3))
    model.to(dtype).save_pretrained(folder, **options)
    return type(model).from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()


def saved(kind: str, folder: Path, config: dict[str, Any], *, text: bool = False, **options: Any) -> Any:
    """A random `kind`ForCausalLM of transformers as `save_random` leaves it; `options` are those of `save_random`.

    `text`: the configuration's class is `kind`TextConfig.
    """
    import transformers

    made = getattr(transformers, f"{kind}{'Text' if text else ''}Config")(**config)
    return save_random(getattr(transformers, f"{kind}ForCausalLM")(made), folder, **options)


def write_config(folder: Path, **changes: Any) -> None:
    """Rewrite keys of a saved config.json, say to the hub's spellings; None drops a key."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def rename_tensors(folder: Path, rename: Callable[[str], str], **added: torch.Tensor) -> None:
    """Give the tensors of a saved model.safetensors other names, as on the hub, and add buffers."""
    path = folder / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_torch(path).items()}
    save_torch({**tensors, **{name: tensor.clone() for name, tensor in added.items()}}, path, metadata={"format": "pt"})


def as_hub(folder: Path, **changes: Any) -> None:
    """Rewrite a config.json that transformers 5 saved to the spellings of the hub, then `changes` as `write_config`."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = dict(content["rope_parameters"])
    hub = {"rope_theta": rope.pop("rope_theta"), "partial_rotary_factor": rope.pop("partial_rotary_factor", None)}
    if rope["rope_type"] != "default":
        hub["rope_scaling"] = rope
    write_config(folder, rope_parameters=None, layer_types=None, **{**hub, **changes})


def check_transformers(
    kind: str,
    folder: Path,
    config: dict[str, Any],
    hub: dict[str, Any] | None = None,
    text: bool = False,
    **options: Any,
) -> runtime.Model:
    """`check_decoder` of a `saved` model; with `hub`, its config.json is rewritten by `as_hub`."""
    model = saved(kind, folder, config, text=text, seed=options.pop("seed", 11))
    if hub is not None:
        as_hub(folder, **hub)
    return check_decoder(folder, logits_of(model), model.config.vocab_size, **options)


def prompts(vocab: int, *lengths: int, seed: int = 5) -> list[list[int]]:
    """Random rows of these lengths."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab, length).tolist() for length in lengths]


def logits_of(model: Any) -> Logits:
    """The logits of a transformers decoder, row by row, without padding."""

    def compute(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            array: np.ndarray = model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()
            return array

    return compute


def greedy_of(logits: Logits, tokens: list[int], count: int) -> tuple[list[int], float]:
    """The likeliest ids one after the other, without a cache, and the smallest lead over the runner-up."""
    ids, lead = list(tokens), float("inf")
    for _ in range(count):
        last = logits(ids)[-1]
        best, second = np.sort(last)[::-1][:2]
        lead = min(lead, float(best - second))
        ids.append(int(last.argmax()))
    return ids[len(tokens) :], lead


def check_decoder(
    checkpoint: Path,
    logits: Logits,
    vocab: int,
    lengths: Sequence[int] = (1, 6, 23, 40),
    new: int = NEW_IDS,
    **options: Any,
) -> runtime.Model:
    """A ragged batch's logits, and greedy ids with the KV cache on, are the reference's; `options` go to compile."""
    bundle = compiler.compile(checkpoint, out=checkpoint.parent / f"{checkpoint.name}-bundle", **options)
    model = runtime.load(bundle)
    rows, worst = prompts(vocab, *lengths), 0.0
    for tokens, found in zip(rows, model.logits(rows), strict=True):
        wanted = logits(tokens)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE, err_msg=f"{len(tokens)} tokens")
        worst = max(worst, float(np.abs(found - wanted).max()))
    expected = [greedy_of(logits, tokens, new) for tokens in rows]
    assert min(lead for _, lead in expected) > 2 * TOLERANCE, (
        "a near tie decides the reference's ids: take another seed"
    )
    assert model.generate(rows, max_new_tokens=new, stop=()) == [ids for ids, _ in expected]
    record(bundle, worst, len(rows) * new)
    return model


def rows_of(ids: np.ndarray, mask: np.ndarray) -> list[list[int]]:
    """The real tokens of padded rows [B, T]."""
    return [row[kept.astype(bool)].tolist() for row, kept in zip(ids, mask, strict=True)]


def check_case(case: str, out: Path, **options: Any) -> runtime.Model:
    """All groups of a case in tests/data/reference: logits of real tokens, greedy ids. `alt.*` is as good."""
    bundle = compiler.compile(REFERENCE / case, out=out, **options)
    model, worst, ids = runtime.load(bundle), 0.0, 0
    cases = load_file(REFERENCE / case / "cases.safetensors")
    groups = [name.split(".")[0] for name in cases if name.endswith(".input_ids")]
    assert groups
    for group in groups:
        mask = cases[f"{group}.attention_mask"].astype(bool)
        rows = rows_of(cases[f"{group}.input_ids"], mask)
        for index, found in enumerate(model.logits(rows)):
            names = [f"{group}.logits", f"alt.{group}.logits"]
            wanted = [cases[name][index][mask[index]] for name in names if name in cases]
            error = min(float(np.abs(found - one).max()) for one in wanted)
            assert error <= TOLERANCE, f"{case} {group} row {index}: {error}"
            worst = max(worst, error)
        if f"{group}.greedy_ids" in cases:
            new = model.generate(rows, max_new_tokens=cases[f"{group}.greedy_ids"].shape[1], stop=())
            assert new == cases[f"{group}.greedy_ids"].tolist(), f"{case} {group}"
            ids += sum(len(row) for row in new)
    record(bundle, worst, ids)
    return model


def _nothing_unfused(graph: Graph) -> None:
    """Nothing is left of the equations of norms and attention: no mean, no softmax over tokens."""
    for equation in walk(graph.equations):
        assert equation.op != "mean", f"a norm is not fused: {equation}"
        assert equation.op != "softmax" or not over_tokens(equation), f"an attention is not fused: {equation}"


def check_golden_ir(name: str, spec: str, size: str) -> None:
    """The graph of a published size after all passes is tests/golden/models/NAME.ir (UPDATE_GOLDENS=1 rewrites it)."""
    graph = compiler.prepare(ROOT / "specs" / "models" / f"{spec}.yaml", size=size).graph
    _nothing_unfused(graph)
    text = _PLACE.sub("", str(graph))  # comments and lines of a spec may move
    path = GOLDENS / f"{name}.ir"
    if os.environ.get("UPDATE_GOLDENS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == _PLACE.sub("", path.read_text(encoding="utf-8")), (
        f"{path.name}: look at the difference, then UPDATE_GOLDENS=1"
    )


def check_fuses(spec: str, size: str, **expected: int) -> None:
    """Every norm, attention and gated MLP of a size is recognised: `expected` counts them as written in the graph.

    `norms`, `attentions`, and `gated`, which the pass of targets that join products finds.
    """
    from compiler.passes.fuse_gated_mlp import FUSE_GATED_MLP
    from compiler.passes.runner import run_passes

    graph = compiler.prepare(ROOT / "specs" / "models" / f"{spec}.yaml", size=size).graph
    _nothing_unfused(graph)
    ops = [equation.op for equation in walk(graph.equations)]
    gated = sum(len(report.hits) for report in run_passes(graph, (FUSE_GATED_MLP,))[1])
    found = {
        "norms": ops.count("rms_norm") + ops.count("layer_norm"),
        "attentions": ops.count("attention") + ops.count("paged_attention"),
        "gated": gated,
    }
    assert {name: count for name, count in found.items() if count} == expected
