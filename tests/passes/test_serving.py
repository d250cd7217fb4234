"""A served decoder computes what the plain equations say: paged cache, ragged prompts, sequences come and go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.ir import Graph
from compiler.ir.parser import parse
from compiler.passes.fold_constants import FOLD_CONSTANTS
from compiler.passes.pipelines import FUSION, JOIN_PRODUCTS, SERVING, decoder, encoder
from compiler.passes.runner import run_passes
from compiler.passes.select_rows import SELECT_ROWS
from tests.passes.graphs import ROPE, Paged, Weights, batch, masked, model, outputs, unrolled

ALIBI = "{kind: alibi, scaled: false}"
LENGTHS = (5, 40, 1, 9)  # 40: more than one block of 32
# Relative to the largest logit. float32: sums of fewer than 100 terms in another order, each rounded to 2^-24, the
# largest seen 2e-6; bfloat16: 2 layers of some 20 roundings to 8 bits each; float16 has 11 bits.
TOLERANCE = {"fp32": 1e-5, "bf16": 20 * 2**-9, "fp16": 20 * 2**-12}

MODELS = {
    "gqa": {},
    "mha": {"kv_heads": 4},
    "mqa": {"kv_heads": 1},
    "window": {"attention": f"mask: causal, window: 6, position: {ROPE}"},
    "alibi": {"attention": f"mask: causal, position: {ALIBI}", "kv_heads": 4},
    "softcap_window": {"attention": "mask: causal, window: 35, softcap: 3.0, position: {kind: none}"},
    "qk_norm_bias": {
        "attention": f"mask: causal, position: {ROPE}, bias: {{qkv: true, out: true}}, qk_norm: {{eps: 1.0e-6}}"
    },
    "layer_norm_mlp": {
        "norm": "{kind: layer_norm, eps: 1.0e-5, bias: true}",
        "mlp": "{kind: mlp, act: gelu, bias: true}",
    },
    "gated_bias": {"mlp": "{kind: gated_mlp, act: gelu_tanh, bias: true}"},
}  # fmt: skip


def reference(graph: Graph, weights: Weights) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Tokens of each sequence, and the logits that the unfused graph gives for them."""
    inputs = batch(LENGTHS)
    logits = outputs(graph, weights, inputs)["logits"]
    rows = [inputs["tokens"][row, :length].tolist() for row, length in enumerate(LENGTHS)]
    return rows, [logits[row, :length] for row, length in enumerate(LENGTHS)]


def assert_close(got: torch.Tensor, want: torch.Tensor, precision: str = "fp32") -> None:
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    error = float((got - want).abs().max() / want.abs().max())
    assert error <= TOLERANCE[precision], f"{error:.1e}"


def serve(graph: Graph, weights: Weights, rows: list[list[int]]) -> list[torch.Tensor]:
    """Logits of every token: prompts in chunks, sequences joining and leaving, single tokens at the end."""
    paged = Paged(graph, weights)
    plan = [{0: 5, 1: 30}, {1: 4, 2: 1}, {1: 5, 3: 3}, {3: 1, 1: 1}, {3: 1}, {3: 4}]
    done = dict.fromkeys(range(len(rows)), 0)
    parts: dict[int, list[torch.Tensor]] = {key: [] for key in done}
    for step in plan:
        new = {key: rows[key][done[key] : done[key] + count] for key, count in step.items()}
        for key, logits in paged.step(new).items():
            parts[key].append(logits)
            done[key] += len(new[key])
    assert [done[key] for key in done] == [len(row) for row in rows]
    return [torch.cat(parts[key]) for key in done]


@pytest.mark.parametrize("name", MODELS)
def test_served_in_steps_is_the_whole_at_once(name: str) -> None:
    built = model(**MODELS[name])  # type: ignore[arg-type]
    weights = Weights(built.graph)
    rows, want = reference(built.graph, weights)
    graph, _ = run_passes(built.graph, decoder("fp32"))
    for got, expected in zip(serve(graph, weights, rows), want, strict=True):
        assert_close(got, expected)


@st.composite
def options(draw: Any) -> dict[str, Any]:
    """Any attention, norm and MLP that a decoder may have."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2), (3, 2)]))
    parts = [draw(st.sampled_from(["mask: causal", "mask: causal", "mask: prefix"]))]
    style, dims = draw(st.sampled_from(["half", "interleaved"])), draw(st.sampled_from([4, 8]))
    rope = f"{{kind: rope, style: {style}, dims: {dims}, theta: 100.0}}"
    parts.append("position: " + draw(st.sampled_from([rope, rope, "{kind: none}", ALIBI])))
    for option in ("window: 3", "window: 33", "softcap: 2.0", "scale: 0.1", "bias: {qkv: true, out: false}",
                   "qk_norm: {eps: 1.0e-6, gain: one_plus}"):  # fmt: skip
        if draw(st.booleans()) and not any(part.startswith(option[:6]) for part in parts):
            parts.append(option)
    norms = (
        "{kind: rms_norm, eps: 1.0e-5}",
        "{kind: layer_norm, eps: 1.0e-5, bias: true}",
        "{kind: layer_norm, eps: 1.0e-5}",
    )
    mlps = ("{kind: gated_mlp, act: silu}", "{kind: gated_mlp, act: relu, bias: true}", "{kind: mlp, act: gelu}")
    return {
        "attention": ", ".join(parts), "norm": draw(st.sampled_from(norms)), "mlp": draw(st.sampled_from(mlps)),
        "heads": kv_heads * group, "kv_heads": kv_heads, "layers": draw(st.integers(1, 3)),
    }  # fmt: skip


@settings(max_examples=25)
@given(options())
def test_any_decoder_served_in_two_steps_is_the_whole_at_once(options: dict[str, Any]) -> None:
    built = model(**options)
    weights = Weights(built.graph)
    rows, want = reference(built.graph, weights)
    graph, reports = run_passes(built.graph, (*FUSION, *SERVING, *JOIN_PRODUCTS, FOLD_CONSTANTS))
    assert all(refusal.rule.startswith("gated") for report in reports for refusal in report.refusals)
    paged = Paged(graph, weights)
    first = paged.step({key: row[:2] for key, row in enumerate(rows)})  # the whole prefix
    rest = paged.step({key: row[2:] for key, row in enumerate(rows) if row[2:]})
    for key, expected in enumerate(want):
        assert_close(torch.cat([first[key], *([rest[key]] if key in rest else [])]), expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_served_in_sixteen_bits(precision: str) -> None:
    built = model(attention=f"mask: causal, position: {ROPE}, qk_norm: {{eps: 1.0e-6}}")
    weights = Weights(built.graph)
    rows, want = reference(built.graph, weights)
    graph, _ = run_passes(built.graph, decoder(precision))
    for got, expected in zip(serve(graph, weights, rows), want, strict=True):
        assert_close(got, expected, precision)


def test_joined_products_serve_the_same() -> None:
    built = model(attention=f"mask: causal, position: {ROPE}, bias: {{qkv: true, out: false}}")
    weights = Weights(built.graph)
    rows, want = reference(built.graph, weights)
    graph, reports = run_passes(built.graph, (*FUSION, *JOIN_PRODUCTS, *SERVING))
    assert all(report.hits for report in reports)
    for got, expected in zip(serve(graph, weights, rows), want, strict=True):
        assert_close(got, expected)


def test_alternating_windows_have_a_cache_for_each_layer() -> None:
    window = "4 if layer % 2 == 0 else 9"
    built = model(attention=f"mask: causal, window: {window}, position: {ROPE}", layers=4)
    weights = Weights(built.graph)
    rows, want = reference(built.graph, weights)
    graph, _ = run_passes(built.graph, decoder("fp32"))
    for got, expected in zip(serve(graph, weights, rows), want, strict=True):
        assert_close(got, expected)
    assert sorted(Paged(graph, weights).states) == [f"layers.{i}.attn.{kind}" for i in range(4) for kind in "kv"]


def test_layers_written_out_serve_the_same() -> None:
    built = model()
    weights = Weights(built.graph)
    rows, want = reference(built.graph, weights)
    graph, _ = run_passes(unrolled(built.graph), decoder("fp32"))
    for got, expected in zip(serve(graph, weights, rows), want, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("position", [ROPE, ALIBI])
def test_prefix_is_seen_whole(position: str) -> None:
    # A prompt with a prefix goes in one step: its tokens see each other. Steps follow after it.
    built = model(attention=f"mask: prefix, position: {position}")
    weights = Weights(built.graph)
    rows, want = reference(built.graph, weights)
    graph, _ = run_passes(built.graph, decoder("fp32"))
    paged = Paged(graph, weights)
    first = paged.step({key: row[:3] for key, row in enumerate(rows) if len(row) > 3})
    rest = paged.step({key: row[3:] for key, row in enumerate(rows) if len(row) > 3})
    for key in first:
        assert_close(torch.cat((first[key], rest[key])), want[key])


def test_only_selected_rows_are_computed() -> None:
    built = model()
    weights = Weights(built.graph)
    rows, want = reference(built.graph, weights)
    graph, _ = run_passes(built.graph, decoder("fp32"))
    got = Paged(graph, weights).step(dict(enumerate(rows)), wanted="last")
    for key, expected in enumerate(want):
        assert_close(got[key], expected[-1:])


def test_encoder_keeps_rows_and_hides_padding() -> None:
    built = model(attention=f"mask: full, position: {ROPE}")
    weights = Weights(built.graph)
    inputs = batch(LENGTHS)
    graph, _ = run_passes(built.graph, encoder("fp32"))
    got, want = (outputs(each, weights, inputs)["logits"] for each in (graph, built.graph))
    assert_close(masked(got, inputs), masked(want, inputs))
    alone = {key: value[3:, : LENGTHS[3]] if value.ndim > 1 else value[3:] for key, value in inputs.items()}
    assert_close(outputs(graph, weights, alone)["logits"][0], want[3, : LENGTHS[3]])


def test_what_is_looked_up_by_a_choice_moves_with_it() -> None:
    """Biases of the experts that a row chose: of the rows whose logits are wanted only, as the products beside them."""
    graph = parse("""graph model(%x: f32[T,8], %table: f32[4,8], %scores: f32[T,4]) {
      dim T in 1..4..16
      %chosen: i32[T,2] = top_k(%scores) {k = 2}
      %bias: f32[T,2,8] = gather(%table, %chosen)
      %row: f32[T,1,8] = reshape(%x) {shape = ("T", 1, 8)}
      %y: f32[T,2,8] = add(%bias, %row)
      return logits = %y
    }
    """)
    after, _ = run_passes(graph, (SELECT_ROWS,))
    lookups = [equation for equation in after.equations if equation.op == "gather" and equation.result.name == "bias"]
    assert [equation.result.type.shape for equation in lookups] == [("N", 2, 8)]
    assert next(equation for equation in after.equations if equation.op == "top_k").result.type.shape == ("N", 2)
