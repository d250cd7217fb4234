"""KV caches in 8 bits on the CPU: what the interpreter computes, near float32, and the same in any batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compiler
import runtime
from compiler.api import float_weights, prepare
from compiler.ir.core import walk
from compiler.validate.metrics import agreement
from compiler.validate.reference import outputs, random_rows
from specs.errors import SpecRTError
from specs.precision import load_caches, load_recipe, with_cache
from tests.golden_errors import check_raises
from tests.precision.models import LENGTHS, MODELS, served
from tests.precision.test_families import SENSITIVE, UNTRAINED

DEMO = Path(__file__).parents[2] / "demo" / "tiny-llama"
# A code that falls on the other side of a tie is off by a step, 1/255 of a row; a sum of values has few of them.
OWN_ROUNDING = {"int8": 1e-3, "fp8": 5e-3}
# many heads, shared heads, one head; linear biases, sinks, widths that differ, softcap (read by plain operations)
FAMILIES = ["gpt2", "llama", "gpt_bigcode", "bloom", "gpt_oss", "deepseek_v2", "gemma2"]
CASES = [(family, "int8") for family in FAMILIES] + [(family, "fp8") for family in ("llama", "bloom", "deepseek_v2")]


def asked(**more: Any) -> dict[str, Any]:
    return {"size": "tiny", "weights": "random", "max_sequence": 64, **more}


@pytest.mark.parametrize(("family", "cache"), CASES)
def test_the_bundle_computes_what_the_graph_says(family: str, cache: str, tmp_path: Path) -> None:
    path = MODELS / f"{family}.yaml"
    prepared = prepare(path, **asked(kv_cache=cache))
    rows = random_rows(prepared.source.config["vocab"], LENGTHS)
    exact = [row["logits"] for row in outputs(prepared.built.graph, float_weights(prepared), rows)]
    model = runtime.load(compiler.compile(path, out=tmp_path / "bundle", **asked(kv_cache=cache)))
    found = model.logits(rows)
    own = agreement(found, served(prepared, float_weights(prepared), rows))
    assert own.relative <= OWN_ROUNDING[cache], own
    off, bound = agreement(found, exact), with_cache(load_recipe("fp32"), cache).bound
    factor = SENSITIVE.get(family, UNTRAINED)
    assert 1e-4 < off.relative <= factor * bound.relative, off
    assert off.mean_kl <= factor * bound.mean_kl, off
    assert model.bundle.manifest["kv_cache"] == cache


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiler.compile(DEMO, kv_cache="int8", out=tmp_path_factory.mktemp("cache") / "bundle")


def test_sequences_do_not_depend_on_each_other(bundle: Path) -> None:
    """In flight together, a prompt in pieces, blocks taken away and computed again: the ids of each alone."""
    tokens = np.load(DEMO / "calibration-tokens.npy").reshape(-1)
    places = ((0, 70), (300, 3), (500, 33), (700, 1), (800, 120))
    rows = [tokens[start : start + size].tolist() for start, size in places]
    alone = [runtime.load(bundle).generate([row], max_new_tokens=40, stop=())[0] for row in rows]
    for options in ({}, {"step_tokens": 16}, {"cache_tokens": 256}):
        model = runtime.load(bundle, **options)
        assert model.generate(rows, max_new_tokens=40, stop=()) == alone
        assert (model.engine.preemptions > 0) == ("cache_tokens" in options)


def test_a_trained_model_hardly_changes(bundle: Path, tmp_path: Path) -> None:
    tokens = np.load(DEMO / "calibration-tokens.npy").reshape(-1)[40_000:41_024].reshape(4, 256).tolist()
    exact = runtime.load(compiler.compile(DEMO, out=tmp_path / "fp32")).logits(tokens)
    fp8 = compiler.compile(DEMO, kv_cache="fp8", out=tmp_path / "fp8")
    for name, path in (("int8", bundle), ("fp8", fp8)):
        off, bound = agreement(runtime.load(path).logits(tokens), exact), load_caches()[name].bound
        assert off.mean_kl <= bound.mean_kl, off
        assert off.relative <= bound.relative, off


def test_a_token_takes_its_codes_and_eight_bytes_a_row(bundle: Path) -> None:
    model = runtime.load(bundle, cache_tokens=64)
    layers, heads, dim = 6, 4, 32
    assert model.executable.cache_bytes == 64 * layers * heads * 2 * (dim + 8)


def test_any_recipe_takes_a_cache() -> None:
    for precision in ("bf16", "w8a16", "fp16"):
        prepared = prepare(MODELS / "llama.yaml", **asked(precision=precision, kv_cache="int8"))
        states = [equation.result.type for equation in walk(prepared.graph.equations) if equation.op == "state"]
        assert {kind.dtype for kind in states} == {"u8"}
        assert prepared.precision.recipe.bound.mean_kl > load_recipe(precision).bound.mean_kl
        assert prepared.precision.recipe.name == precision


def test_the_cache_of_a_recipe_is_that_of_the_flag(tmp_path: Path) -> None:
    text = (MODELS.parent / "precisions" / "fp32.yaml").read_text().replace("name: fp32", "name: mine")
    (tmp_path / "mine.yaml").write_text(text + "kv_cache: int8\n")
    own = prepare(MODELS / "llama.yaml", **asked(precision=str(tmp_path / "mine.yaml")))
    flag = prepare(MODELS / "llama.yaml", **asked(kv_cache="int8"))
    assert str(own.graph) == str(flag.graph)


def test_wrong_requests() -> None:
    check_raises("PREC-018", prepare, MODELS / "bert.yaml", **asked(kv_cache="int8"))
    with pytest.raises(SpecRTError, match="unknown kv_cache `int4`"):
        prepare(MODELS / "llama.yaml", **asked(kv_cache="int4"))
