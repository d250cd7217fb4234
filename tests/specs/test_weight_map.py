"""The weight map: every tensor exactly once, fused layouts, transposition, ties, and what each mistake says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specs.checkpoint import Checkpoint
from specs.config import resolve_config
from specs.errors import Where
from specs.layouts import parse_layout
from specs.schema import Spec, load_spec
from specs.spellings import respell, respelled
from specs.weight_map import Select, WeightSource, map_weights, take
from tests.golden_errors import check_raises
from tests.specs.samples import CONFIG, HERE, SHAPES, broken, needed, write_checkpoint, write_spec

FUSED = "[q: heads, k: kv_heads, v: kv_heads] d_head"


def mapped(
    folder: Path,
    spec: Spec | None = None,
    drop: tuple[str, ...] = (),
    add: dict[str, tuple[int, ...]] | None = None,
    dtype: str = "F32",
    **config: Any,
) -> dict[str, WeightSource]:
    """Map a checkpoint of the small architecture with some tensors dropped and added."""
    spec = spec or load_spec(write_spec(folder))
    shapes = {name: shape for name, shape in SHAPES.items() if name not in drop} | (add or {})
    checkpoint = Checkpoint.open(write_checkpoint(folder, shapes, {**CONFIG, **config}, dtype))
    env = resolve_config(spec, checkpoint.config, HERE)
    return map_weights(spec, env, needed(spec, tied=env["tied"]), checkpoint)


def test_every_weight_has_its_tensor(tmp_path: Path) -> None:
    sources = mapped(tmp_path)
    assert len(sources) == 19
    assert sources["layers.1.mlp.down.weight"].tensor.name == "layers.1.down.weight"
    assert {sources[f"layers.1.attn.{leaf}.weight"].tensor.name for leaf in "qkv"} == {"layers.1.qkv.weight"}


def test_a_fused_tensor_is_cut_by_its_layout(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    sources = mapped(tmp_path)
    q, k, v = (sources[f"layers.0.attn.{leaf}.weight"].read() for leaf in "qkv")
    assert [x.shape[0] for x in (q, k, v)] == [8, 4, 4]
    assert [int(x[0, 0]) for x in (q, k, v)] == [0, 8 * 8, 12 * 8]
    # per group: two q heads, then k, then v
    spec = broken(tmp_path, FUSED, "kv_heads [q: heads / kv_heads, k, v] d_head")
    sources = mapped(tmp_path, spec)
    q, k, v = (sources[f"layers.0.attn.{leaf}.weight"].read()[:, 0] // 8 for leaf in "qkv")
    assert q.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert k.tolist() == [4, 5, 12, 13]
    assert v.tolist() == [6, 7, 14, 15]


def test_a_transposed_tensor(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    spec = broken(tmp_path, "mlp.up:   layers.{i}.up", 'mlp.up:   {from: "layers.{i}.up", transpose: true}')
    up: dict[str, tuple[int, ...]] = {f"layers.{i}.up.weight": (8, 6) for i in range(2)}
    weight = mapped(tmp_path, spec, add=up)["layers.0.mlp.up.weight"].read()
    assert tuple(weight.shape) == (6, 8)
    assert weight[1].tolist() == [1 + 6 * column for column in range(8)]


def test_alternative_names(tmp_path: Path) -> None:
    spec = broken(tmp_path, "norm_f:   norm", "norm_f:   model.norm | norm")
    assert mapped(tmp_path, spec)["norm_f.weight"].tensor.name == "norm.weight"


def test_full_names(tmp_path: Path) -> None:
    spec = broken(tmp_path, "norm_f:   norm", "norm_f:   {weight: gamma}")
    found = mapped(tmp_path, spec, drop=("norm.weight",), add={"gamma": (8,)})
    assert found["norm_f.weight"].tensor.name == "gamma"


@pytest.mark.parametrize("stored", ["both", "embed", "head"])
def test_a_tied_weight_may_be_stored_once_or_twice(stored: str, tmp_path: Path) -> None:
    drop = {"both": (), "embed": ("head.weight",), "head": ("embed.weight",)}[stored]
    found = mapped(tmp_path, drop=drop, tie=True)
    assert "head.weight" not in found
    assert found["embed.weight"].tensor.name == ("head.weight" if stored == "head" else "embed.weight")


def test_an_ignored_tensor(tmp_path: Path) -> None:
    assert len(mapped(tmp_path, add={"layers.0.unused": (3,), "layers.11.unused": (3,)})) == 19


def test_missing_extra_and_misshaped(tmp_path: Path) -> None:
    check_raises("CKPT-010-missing", mapped, tmp_path, drop=("layers.1.o.weight",), add={"layers.1.out.weight": (8, 8)})
    layer = tuple(name for name in SHAPES if name.startswith("layers.1."))
    check_raises("CKPT-010-many-missing", mapped, tmp_path, drop=("embed.weight", "norm.weight", *layer))
    check_raises("CKPT-010-untied", mapped, tmp_path, drop=("head.weight",))
    check_raises("CKPT-011-extra", mapped, tmp_path, add={"layers.0.gate.bias": (6,)})
    check_raises("CKPT-011-many-extra", mapped, tmp_path, add={f"layers.{i}.norm_2.weight": (8,) for i in range(12)})
    check_raises("CKPT-012-misshaped", mapped, tmp_path, add={"layers.0.up.weight": (7, 8)})
    check_raises("CKPT-012-transposed", mapped, tmp_path, add={"layers.0.up.weight": (8, 6)})
    check_raises("CKPT-012-fused", mapped, tmp_path, add={"layers.0.qkv.weight": (24, 8)})
    check_raises("CKPT-014-integers", mapped, tmp_path, dtype="I64")


def test_mistakes_of_the_map_itself(tmp_path: Path) -> None:
    check_raises("CKPT-012-layout", mapped, tmp_path, broken(tmp_path, FUSED, "heads [q, k, v] d_head"))
    check_raises("CKPT-013-twice", mapped, tmp_path, broken(tmp_path, "layers.{i}.up", "layers.{i}.gate"))
    check_raises("SPEC-032-no-rows", mapped, tmp_path, broken(tmp_path, FUSED, "[q: heads - 4, k, v] d_head"))
    check_raises("SPEC-033-no-entry", mapped, tmp_path, broken(tmp_path, "  norm_f:   norm\n", ""))


def test_spellings(tmp_path: Path) -> None:
    added = "spellings: {.gamma: .weight, old.: layers., .Norm.: .norm.}\ncheckpoint:\n"
    spec = broken(tmp_path, "checkpoint:\n", added)
    assert respell("old.3.Norm.gamma", spec.spellings) == "layers.3.norm.weight"
    assert respell("other.gamma.bias", spec.spellings) == "other.gamma.bias"
    stored = {"old.1.Norm.gamma" if name == "layers.1.norm.weight" else name: shape for name, shape in SHAPES.items()}
    checkpoint = respelled(spec, Checkpoint.open(write_checkpoint(tmp_path, stored)))
    sources = map_weights(spec, resolve_config(spec, checkpoint.config, HERE), needed(spec), checkpoint)
    assert sources["layers.1.norm_1.weight"].tensor.stored == "old.1.Norm.gamma"
    pytest.importorskip("torch")
    assert sources["layers.1.norm_1.weight"].read().shape == (8,)
    both = {**SHAPES, "old.1.norm.gamma": (8,)}
    check_raises("CKPT-018", respelled, spec, Checkpoint.open(write_checkpoint(tmp_path, both)))


def test_a_piece_that_nothing_uses(tmp_path: Path) -> None:
    spec = load_spec(write_spec(tmp_path))
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path))
    env = resolve_config(spec, checkpoint.config, HERE)
    less = [decl for decl in needed(spec) if decl.name != "layers.1.attn.v.weight"]
    check_raises("CKPT-011-piece", map_weights, spec, env, less, checkpoint)


# ---- layouts as a property ---------------------------------------------------------------------------------

counts = st.integers(1, 3)


@settings(deadline=None, max_examples=60)
@given(outer=counts, pieces=st.lists(counts, min_size=1, max_size=4), inner=counts, width=counts)
def test_cutting_and_joining_are_inverse(outer: int, pieces: list[int], inner: int, width: int) -> None:
    torch = pytest.importorskip("torch")
    env = {"outer": outer, "inner": inner}
    bracket = ", ".join(f"p{i}: {count}" for i, count in enumerate(pieces))
    layout = parse_layout(f"outer [{bracket}] (inner * 1)", Where("x"))
    size, spans, axis, rows = layout.sizes(env)
    stored = torch.arange(outer * sum(pieces) * inner * width).reshape(-1, width)
    parts = [
        take(stored, Select(False, size, axis, rows, *span), (outer * (span[1] - span[0]) * inner, width))
        for span in spans.values()
    ]
    joined = torch.cat([part.reshape(outer, -1, inner, width) for part in parts], dim=1)
    assert torch.equal(joined.reshape(-1, width), stored)
