"""Graphs of ranks mean what the whole graph does, and are split as Megatron does it, whatever the model is.

Tolerance 2e-5 of the largest logit, in float32: sums over features are taken in another order, n eps of the sum of
absolute values at most (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import compiler
from compiler.api import weights_of
from compiler.ir.core import Equation, Graph, Value, walk
from compiler.ir.interpreter import run
from compiler.ir.parser import parse
from compiler.ir.ranks import run_ranks
from compiler.passes.pipelines import JOIN_PRODUCTS, pipeline
from compiler.passes.runner import PassReport, run_passes
from compiler.passes.split_tensors import split_tensors
from compiler.passes.unroll import unroll
from tests.golden_errors import ROOT, check_raises
from tests.passes.graphs import ROPE, Weights, model, paged_states, text_of
from tests.tensorrt.models import SPECS, tiny

TOLERANCE = 2e-5
# Two sequences of 4 and 3 tokens, then one more of each.
STEPS = (
    {"tokens": [3, 5, 7, 11, 2, 9, 4], "positions": [0, 1, 2, 3, 0, 1, 2], "past_lens": [0, 0],
     "seq_begins": [0, 4, 7], "max_context": 4, "select": [3, 5, 6]},
    {"tokens": [8, 6], "positions": [4, 3], "past_lens": [4, 3], "seq_begins": [0, 1, 2], "max_context": 5,
     "select": [0, 1]},
)  # fmt: skip
SAME = {"block_ids": [1, 0], "block_begins": [0, 1, 2], "prefix": [2, 1]}


def ranks_of(graph: Graph, count: int, role: str = "decoder", codes: str | None = None) -> list[Graph]:
    """The graphs of so many ranks, as a GPU gets them."""
    return [
        run_passes(graph, pipeline(role, "fp32", "sm90", codes=codes, split=(split_tensors(count, rank),)))[0]
        for rank in range(count)
    ]


def split(graph: Graph, count: int = 2) -> tuple[Graph, PassReport]:
    """A graph of rank 0 before products are joined, and what the pass said."""
    passes = pipeline("decoder", "fp32", "sm90", split=(split_tensors(count, 0),))
    done, reports = run_passes(graph, passes[: -len(JOIN_PRODUCTS)])
    return done, reports[-1]


def inputs_of(graph: Graph, step: dict[str, object]) -> dict[str, torch.Tensor]:
    """What a graph reads in a step; other inputs are zeros."""
    sizes = {"B": 2, "S": 5, "T": len(step["tokens"])}  # type: ignore[arg-type]
    known = {**step, **SAME}
    found = {}
    for value in graph.inputs:
        shape = [sizes[dim] if isinstance(dim, str) and dim in sizes else dim for dim in value.type.shape]
        if value.name in known and value.type.rank < 2:
            found[value.name] = torch.tensor(known[value.name], dtype=torch.int32)
        elif value.name in ("tokens", "positions"):
            found[value.name] = torch.arange(5, dtype=torch.int32).repeat(2, 1)
        else:
            found[value.name] = torch.zeros([int(dim) for dim in shape], dtype=torch.int32)
    return found


def check_same(
    graph: Graph, ranks: Sequence[Graph], weights: Callable[[str], torch.Tensor], tolerance: float = TOLERANCE
) -> None:
    """All steps' outputs of the ranks are those of the whole graph."""
    states, parts = paged_states(graph, 2), [paged_states(one, 2) for one in ranks]
    for step in STEPS:
        inputs = inputs_of(graph, step)
        expected, got = run(graph, inputs, weights, states), run_ranks(ranks, inputs, weights, parts)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance * float(value.abs().max()))


def counted(graph: Graph) -> Counter[str]:
    return Counter(equation.op for equation in walk(graph.equations))


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_two_ranks_of_every_model(path: Path) -> None:
    found = tiny(path)
    ranks = ranks_of(found.built.graph, 2, found.role)
    check_same(found.graph, ranks, found.weights)
    texts = {re.sub(r"\{axis = -\d, start = \d+, stop = \d+\}|slopes = \([^)]*\)", "", text_of(one)) for one in ranks}
    assert len(texts) == 1
    assert counted(ranks[0])["all_reduce"] == counted(ranks[1])["all_reduce"] >= 2


@pytest.mark.parametrize("name", ["llama", "gemma", "bloom", "deepseek_v3", "gpt_oss", "chatglm2"])
def test_four_ranks(name: str) -> None:
    found = tiny(next(path for path in SPECS if path.stem == name))
    check_same(found.graph, ranks_of(found.built.graph, 4, found.role), found.weights)


def test_a_layer_is_split_as_megatron_does() -> None:
    done, report = split(model().graph)
    assert report.refusals == ()
    assert counted(done)["all_reduce"] == 2 * 2  # of the round left in `repeat` and of the last layer, two each
    assert counted(done)["all_gather"] == 1
    rules = {hit.at: hit.rule for hit in report.hits}
    columns = ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up", "head")
    assert {rules[name] for name in columns} == {"columns"}
    assert (rules["attn.o"], rules["mlp.down"], rules["attn.attention"]) == ("rows", "rows", "heads")


def test_parallel_blocks_are_added_up_once() -> None:
    path = next(path for path in SPECS if path.stem == "gpt_neox")
    done, _ = split(tiny(path).built.graph)
    assert counted(done)["all_reduce"] == 2  # one for each layer: of the round left in `repeat`, and of the last one


def test_a_bias_behind_a_sum_is_added_once() -> None:
    biased = model(attention=f"mask: causal, position: {ROPE}, bias: {{qkv: true, out: true}}").graph
    done, _ = split(biased)
    made = {value.name: equation for equation in walk(done.equations) for value in equation.results}
    bias = next(eq for eq in walk(done.equations) if eq.op == "add" and eq.values[1].name == "attn.o.bias")
    assert made[bias.values[0].name].op == "all_reduce"


def test_copies_of_keys_and_values() -> None:
    done, report = split(model(heads=8, kv_heads=2).graph, 4)
    attention = next(eq for eq in walk(done.equations) if eq.op == "paged_attention")
    assert [value.type.shape[-2] for value in attention.values[:3]] == [2, 1, 1]
    assert attention.values[3].type.shape[1] == 1
    assert "heads_with_copies" in {hit.rule for hit in report.hits}


def test_what_can_not_be_split_stays_whole() -> None:
    built = model(vocab=33)
    done, report = split(built.graph)
    (refusal,) = report.refusals
    assert (refusal.at, "33" in refusal.reason) == ("head", True)
    assert counted(done)["all_gather"] == 0
    whole, _ = run_passes(built.graph, pipeline("decoder", "fp32", "sm90"))
    check_same(whole, ranks_of(built.graph, 2), Weights(whole))


@pytest.mark.parametrize("codes", ["u8", "f8e4m3"])
def test_caches_of_codes_have_fewer_heads(codes: str) -> None:
    built = model().graph
    whole, _ = run_passes(built, pipeline("decoder", "fp32", "sm90", codes=codes))
    # codes are rounded: a sum in another order may take one to its neighbour, 1/255 or 1/16 of the row's range
    check_same(whole, ranks_of(built, 2, codes=codes), Weights(whole), 2e-2)


def test_heads_that_ranks_can_not_share() -> None:
    gpt2 = next(path for path in SPECS if path.stem == "gpt2")
    options = {"size": "xl", "target": "sm90", "precision": "fp16"}  # 25 heads
    check_raises("PASS-005", compiler.prepare, gpt2, tensor_parallel=2, **options)
    compiler.prepare(gpt2, tensor_parallel=5, **options)


def test_blocks_that_share_a_scale_are_not_cut() -> None:
    llama = next(path for path in SPECS if path.stem == "llama")
    options = {"size": "tiny", "tensor_parallel": 2}
    demo = {"precision": "w4a16", "target": "sm90", "tensor_parallel": 8}  # a part of 704 columns is no multiple of 16
    check_raises("PASS-004", compiler.prepare, ROOT / "demo" / "tiny-llama", **demo)
    blackwell = {"target": "sm100", "toolchain": "tensorrt-10.8"}
    check_raises("PASS-004-input", compiler.prepare, llama, precision="mxfp8", **blackwell, **options)


def test_blocks_that_two_ranks_share_become_smaller_ones() -> None:
    """704 columns in blocks of 64 over two ranks: parts of 352 in blocks of 32, the same numbers to the last bit."""
    options = {"precision": "w4a16", "target": "sm90"}
    whole = compiler.prepare(ROOT / "demo" / "tiny-llama", **options)
    weights, name = weights_of(whole), "mlp.down.weight"
    found = [
        run(_product_weight(graph, name), {}, weights)["out"]
        for graph in (whole.graph, *compiler.prepare(ROOT / "demo" / "tiny-llama", tensor_parallel=2, **options).ranks)
    ]
    assert [tensor.shape[-1] for tensor in found] == [704, 352, 352]
    assert torch.equal(torch.cat(found[1:], -1), found[0])


def _product_weight(graph: Graph, name: str) -> Graph:
    """The graph of the weight that the last product by `name` reads."""
    made = {value.name: equation for equation in unroll(graph).equations for value in equation.results}
    used = [eq for eq in made.values() if eq.op == "matmul" and f"{name}" in eq.values[1].name]
    needed: dict[str, Equation] = {}

    def visit(value: Value) -> None:
        for operand in made[value.name].values:
            visit(operand)
        needed.setdefault(value.name, made[value.name])

    visit(used[-1].values[1])
    return Graph("weight", (), (), tuple(needed.values()), (("out", used[-1].values[1]),))


def test_heads_behind_what_needs_whole_rows() -> None:
    """A norm of all heads' numbers together, which no shipped model has: each rank would need the others'."""
    text = """graph g(%x: f32[T,16], %at: i32[1,T]) {
      dim T in 1..4..8
      %w: f32[16,16] = weight() {name = "q"}
      %gain: f32[16] = weight() {name = "gain"}
      %q0: f32[T,16] = matmul(%x, %w) {transpose_b = true} @ model.yaml:7:3
      %q1: f32[T,16] = rms_norm(%q0, %gain) {eps = 0.00001} @ model.yaml:8:3
      %q: f32[1,T,2,8] = reshape(%q1) {shape = (1, "T", 2, 8)}
      %y: f32[1,T,2,8] = attention(%q, %q, %q, %at) {scale = 1.0, causal = true} @ model.yaml:9:3
      return out = %y
    }"""
    check_raises("PASS-005-norm", run_passes, parse(text), (split_tensors(2, 0),))


def test_constants_stand_in_segments_that_all_share() -> None:
    """Numbers that would differ by rank keep the product whole that meets them; equal ones are cut."""
    text = """graph g(%x: f32[T,16]) {{
      dim T in 1..4..8
      %w: f32[4,16] = weight() {{name = "w"}}
      %y: f32[T,4] = matmul(%x, %w) {{transpose_b = true}}
      %c: f32[4] = const() {{value = {numbers}}}
      %z: f32[T,4] = mul(%y, %c)
      %o.weight: f32[16,4] = weight() {{name = "o"}}
      %o: f32[T,16] = matmul(%z, %o.weight) {{transpose_b = true}}
      return out = %o
    }}"""
    for numbers, exchanges in (("(2.0, 2.0, 2.0, 2.0)", ["all_reduce"]), ("(1.0, 2.0, 3.0, 4.0)", ["all_gather"])):
        done, report = run_passes(parse(text.format(numbers=numbers)), (split_tensors(2, 0),))
        assert [eq.op for eq in walk(done.equations) if eq.op.startswith("all_")] == exchanges
    assert "would differ by GPU" in report[0].refusals[0].reason
