"""Names of caches: what an attention's weights are called, one cache for each layer whatever they are called."""

from __future__ import annotations

import pytest

from compiler.ir import Graph, walk
from compiler.passes.fuse_attention import FUSE_ATTENTION
from compiler.passes.insert_kv_cache import INSERT_KV_CACHE, insert_kv_cache
from compiler.passes.round_kv_cache import round_kv_cache
from compiler.passes.runner import run_passes
from tests.passes.cases_fusion import qkv
from tests.passes.cases_serving import fused
from tests.passes.graphs import ROPE, edited, unrolled


def caches(graph: Graph) -> list[str]:
    done, _ = run_passes(graph, (INSERT_KV_CACHE,))
    return [str(equation.attr["name"]) for equation in walk(done.equations) if equation.op == "state"]


def test_named_like_the_weights() -> None:
    assert caches(fused()) == ["layers.{i}.attn.k", "layers.{i}.attn.v"]
    assert caches(unrolled(fused())) == [f"layers.{i}.attn.{kind}" for i in range(2) for kind in "kv"]


@pytest.mark.parametrize("more", [", qk_norm: {eps: 1.0e-6}", ", bias: {qkv: true, out: true}"])
def test_norms_and_biases_do_not_matter(more: str) -> None:
    assert caches(qkv(f"mask: causal, position: {ROPE}{more}")) == ["layers.{i}.attn.k", "layers.{i}.attn.v"]


def test_weights_that_all_layers_share_still_have_a_cache_each() -> None:
    lines = [f'    %attn.{x}.weight: f32[{n},16] = weight() {{name = "layers.{{i}}.attn.{x}.weight"}}\n' for x, n in
             (("q", 32), ("k", 16), ("v", 16))]  # fmt: skip
    shared = "".join(line.replace("layers.{i}.", "") for line in lines)
    graph = edited(fused(), *((line, "") for line in lines), ("  %x.out:", shared + "  %x.out:"))
    assert caches(graph) == ["layers.{i}.attn.k", "layers.{i}.attn.v"]


def test_two_attentions_on_the_same_weights_have_two_caches() -> None:
    text = unrolled(fused())
    graph = edited(text, *((f"layers.1.attn.{x}.weight", f"layers.0.attn.{x}.weight") for x in "qkv"))
    assert caches(graph) == [
        "layers.0.attn.k",
        "layers.0.attn.v",
        "layers.0.attn.2.k",
        "layers.0.attn.2.v",
    ]


def test_a_softmax_over_a_fixed_number_of_things_is_no_attention() -> None:
    graph = edited(
        fused(),
        ("  return logits = %head", "  %probabilities: f32[B,S,32] = softmax(%head)\n  return logits = %probabilities"),
    )
    assert caches(graph) == ["layers.{i}.attn.k", "layers.{i}.attn.v"]
    _, (report,) = run_passes(graph, (FUSE_ATTENTION,))
    assert not report.refusals


def test_a_cache_of_codes_has_rows_of_bytes() -> None:
    done, _ = run_passes(fused(), (insert_kv_cache("u8"),))
    states = [equation.result.type for equation in walk(done.equations) if equation.op == "state"]
    assert [(kind.dtype, kind.shape) for kind in states] == [("u8", ("C", 2, 32, 16))] * 2
    (attention,) = (equation for equation in walk(done.equations) if equation.op == "paged_attention")
    assert attention.attr["codes"] == "u8"


def test_rounded_in_front_of_a_wide_cache() -> None:
    graph, _ = run_passes(fused(), (INSERT_KV_CACHE,))
    done, (report,) = run_passes(graph, (round_kv_cache("f8e4m3"),))
    assert len(report.hits) == 1
    made = {value.name: equation for equation in walk(done.equations) for value in equation.results}
    (attention,) = (equation for equation in walk(done.equations) if equation.op == "paged_attention")
    for value in attention.values[1:3]:
        wide = made[value.name]
        codes = made[wide.values[0].name]
        assert (wide.op, codes.op, made[codes.values[1].name].op) == ("dequantize", "quantize", "row_scale")
        assert codes.result.type.dtype == "f8e4m3"
    assert [kind.dtype for kind in (value.type for value in attention.values[3:5])] == ["f32", "f32"]
