"""Drafts of checkpoints whose `model_type` no spec has: they load, hold for the checkpoint, and where nothing but the
usual is left open they compute what the reference does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compiler
import runtime
from compiler.infer import Draft, infer
from specs.schema import load_spec
from tests.families.harness import TOLERANCE, logits_of, prompts, save_random, write_config
from tests.golden_errors import ROOT, check_raises
from tests.specs.samples import write_checkpoint

transformers = pytest.importorskip("transformers")
GOLDENS = ROOT / "tests" / "golden" / "infer"
VOCAB = 96
WIDE = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**WIDE, "num_key_value_heads": 2}
OLD = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}

# name: class of the model, sizes
AGREE: dict[str, tuple[str, dict[str, Any]]] = {
    "separate": ("Llama", {**GROUPED, "head_dim": 16}),
    "query and key norms": ("Qwen3", {**GROUPED, "head_dim": 16}),
    "query, key and value biases": ("Qwen2", {**GROUPED}),
    "window": ("Mistral", {**GROUPED, "sliding_window": 4}),
    "fused rows": ("Phi3", {**GROUPED, "pad_token_id": 0}),
    "layer norms, plain mlp": ("Starcoder2", {**GROUPED}),
    "transposed, learned positions": ("GPT2", OLD),
    "positions from row 2": (
        "OPT",
        {
            "hidden_size": 48,
            "ffn_dim": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 48,
            "max_position_embeddings": 64,
        },
    ),
    "side by side, two norms, fused by head": ("GPTNeoX", {**WIDE, "hidden_size": 64}),
    "side by side, one norm": ("Falcon", {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "side by side, partial rotary, head bias": ("Phi", {**WIDE}),
}
# name: class, sizes, how many tensors are left out: what differs is marked CHECK, so only that it loads is promised
LOADS: dict[str, tuple[str, dict[str, Any], int]] = {
    "interleaved": ("GPTJ", {**OLD, "rotary_dim": 8}, 0),
    "norms around": ("Gemma2", {**GROUPED, "head_dim": 16}, 0),
    "norms after, wide query norms": ("Olmo2", {**WIDE}, 2),
    "nested alibi key": ("Mpt", {"d_model": 48, "n_layers": 2, "n_heads": 4}, 0),
    "embedding norm": ("Bloom", {"hidden_size": 48, "n_layer": 2, "n_head": 4}, 0),
}


def unknown(folder: Path, kind: str, sizes: dict[str, Any], architecture: str = "ForCausalLM") -> Any:
    """A saved random model of a model_type that nothing knows."""
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCAB, **sizes)
    named = "LMHeadModel" if kind == "GPT2" else architecture
    model = save_random(getattr(transformers, f"{kind}{named}")(config), folder)
    write_config(folder, model_type="zebra")
    return model


def written(draft: Draft, folder: Path) -> Path:
    path = folder / "zebra.yaml"
    path.write_text(draft.text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", AGREE)
def test_the_draft_computes_what_the_reference_does(name: str, tmp_path: Path) -> None:
    model = unknown(tmp_path / "model", *AGREE[name])
    draft = infer(tmp_path / "model")
    assert draft.ignored == ()
    bundle = compiler.compile(written(draft, tmp_path), tmp_path / "model", out=tmp_path / "bundle")
    rows, wanted = prompts(VOCAB, 1, 9, 20), logits_of(model)
    for tokens, found in zip(rows, runtime.load(bundle).logits(rows), strict=True):
        np.testing.assert_allclose(found, wanted(tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", LOADS)
def test_the_draft_loads(name: str, tmp_path: Path) -> None:
    kind, sizes, ignored = LOADS[name]
    unknown(tmp_path / "model", kind, sizes)
    draft = infer(tmp_path / "model")
    assert len(draft.ignored) == ignored
    compiler.prepare(written(draft, tmp_path), tmp_path / "model")


def test_a_window_that_is_switched_off(tmp_path: Path) -> None:
    unknown(tmp_path / "model", "Qwen2", {**GROUPED})
    write_config(tmp_path / "model", sliding_window=4, use_sliding_window=False)
    draft = infer(tmp_path / "model")
    assert "window: window" not in draft.text
    assert any("sliding_window" in check.about for check in draft.checks)


def test_an_encoder(tmp_path: Path) -> None:
    unknown(tmp_path / "model", "Bert", WIDE, "ForMaskedLM")
    draft = infer(tmp_path / "model")
    assert "mask: full" in draft.text
    assert "x = norm_1(x + attn(x))" in draft.text
    assert all("cls.predictions" in name for name in draft.ignored)
    compiler.prepare(written(draft, tmp_path), tmp_path / "model")


def test_checks_stand_where_they_say(tmp_path: Path) -> None:
    unknown(tmp_path / "model", "Gemma2", LOADS["norms around"][1])
    draft = infer(tmp_path / "model")
    lines = draft.text.splitlines()
    assert [lines[check.line - 1].strip() for check in draft.checks] == [f"# CHECK: {c.text}" for c in draft.checks]
    assert sum("# CHECK" in line for line in lines) == len(draft.checks)
    about = {check.about for check in draft.checks}
    assert {"source", "norm_1", "attn.window", "attn.position", "graph"} <= about
    assert any("attn_logit_softcapping" in one for one in about)


def test_golden(tmp_path: Path) -> None:
    unknown(tmp_path / "model", "Phi3", AGREE["fused rows"][1])
    text = infer(tmp_path / "model").text
    path = GOLDENS / "fused.yaml"
    if os.environ.get("UPDATE_GOLDENS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


# -- a checkpoint without any library: one layer, each matrix [out, in] ----------------------------------------------

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (10, 8),
    "blocks.0.norm1.weight": (8,),
    "blocks.0.attn.q.weight": (8, 8),
    "blocks.0.attn.k.weight": (4, 8),
    "blocks.0.attn.v.weight": (4, 8),
    "blocks.0.attn.o.weight": (8, 8),
    "blocks.0.norm2.weight": (8,),
    "blocks.0.mlp.up.weight": (12, 8),
    "blocks.0.mlp.down.weight": (8, 12),
    "norm.weight": (8,),
}
CONFIG = {"model_type": "zebra", "dim": 8, "n_heads": 4, "vocab_size": 10}


def without(*names: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in SHAPES.items() if name not in names}


def test_numbers_stand_for_keys_that_are_missing(tmp_path: Path) -> None:
    draft = infer(write_checkpoint(tmp_path, SHAPES, CONFIG))
    spec = load_spec(written(draft, tmp_path))
    assert (spec.config["layers"].text, spec.config["kv_heads"].text, spec.config["d_ffn"].text) == ("1", "2", "12")
    assert {"config.layers", "config.kv_heads", "config.d_ffn", "config.eps"} <= {check.about for check in draft.checks}


def test_values_that_yaml_would_misread(tmp_path: Path) -> None:
    odd = {"a": 1e-5, "b": "no", "c": "1e5", "d": [1, "x: y"], "e": {"f g": 1e20}, "h": 'say "{i}"', "on": True}
    infer(write_checkpoint(tmp_path, SHAPES, {**CONFIG, **odd}))


REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "SPEC-080-no-model-type": (SHAPES, {**CONFIG, "model_type": None}),
    "SPEC-080-no-heads": (SHAPES, {**CONFIG, "n_heads": None}),
    "SPEC-080-no-output-projection": (without("blocks.0.attn.o.weight") | {"blocks.0.attn.z.weight": (8, 8)}, CONFIG),
    "SPEC-080-experts": ({**SHAPES, "blocks.0.experts.0.up.weight": (12, 8)}, CONFIG),
    "SPEC-080-two": ({**SHAPES, "blocks.0.cross.q_proj.weight": (8, 8)}, CONFIG),
    "SPEC-080-shapes": (SHAPES, {**CONFIG, "n_heads": 3}),
    "SPEC-080-widths": ({**SHAPES, "blocks.0.mlp.up.weight": (14, 8)}, CONFIG),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_drafted(name: str, tmp_path: Path) -> None:
    shapes, config = REFUSED[name]
    check_raises(name, infer, write_checkpoint(tmp_path, shapes, config))


def test_a_draft_that_does_not_hold(tmp_path: Path) -> None:
    check_raises("SPEC-081", infer, write_checkpoint(tmp_path, SHAPES, CONFIG, dtype="I64"))


def test_every_hint_is_spelled_as_it_is_compared() -> None:
    """Names are compared in lower case, so a pattern with a capital would never match."""
    from compiler.infer.hints import load_hints

    hints = load_hints()
    groups: list[dict[str, list[str]]] = [hints.layer, hints.outside, *(entry["words"] for entry in hints.norms)]
    patterns = [pattern for group in groups for words in group.values() for pattern in words]
    assert patterns == [pattern.lower() for pattern in patterns]
    assert {entry["placement"] for entry in hints.norms} <= set(hints.wirings)
