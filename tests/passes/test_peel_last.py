"""Taking the last round out of `repeat`: the same numbers, and fewer rows in the last layer."""

from __future__ import annotations

import torch

from compiler.ir.core import walk
from compiler.ir.verify import verify
from compiler.passes.peel_last import PEEL_LAST
from compiler.passes.pipelines import decoder, pipeline
from compiler.passes.runner import Log, run_passes
from tests.passes.graphs import Paged, Weights, batch, model, outputs


def test_peeled_computes_the_same() -> None:
    built = model(layers=3).graph
    log = Log()
    peeled = PEEL_LAST.apply(built, log)
    verify(peeled)
    (loop,) = [equation for equation in peeled.equations if equation.body is not None]
    assert loop.attr["count"] == 2
    assert [hit.at for hit in log.hits] == ["x.out"]
    weights, inputs = Weights(built), batch((5, 3))
    expected = outputs(built, weights, inputs)["logits"]
    assert torch.equal(outputs(peeled, weights, inputs)["logits"], expected)


def test_one_round_is_left_alone() -> None:
    built, log = model(layers=1).graph, Log()
    assert PEEL_LAST.apply(built, log) == built
    assert [refusal.reason for refusal in log.refusals] == ["one round only"]


def test_the_last_layer_sees_selected_rows_only() -> None:
    built = model(layers=3).graph
    peeled, _ = run_passes(built, pipeline("decoder", "fp32", "sm90"))
    plain, _ = run_passes(built, decoder("fp32"))
    shapes = {
        equation.results[0].name: equation.results[0].type.shape[:1]
        for equation in walk(peeled.equations)
        if equation.op == "matmul"
    }
    assert shapes["layers.2.attn.o"] == shapes["layers.2.mlp.down"] == ("N",)
    assert shapes["attn.o"] == shapes["layers.2.attn.qkv"] == ("T",)
    weights = Weights(plain)
    calls = ({0: [3, 1, 4, 1, 5], 1: [9, 2]}, {0: [6], 1: [5, 3]})
    for wanted in ("all", "last"):
        one, other = Paged(peeled, weights), Paged(plain, weights)
        for call in calls:
            got, expected = one.step(dict(call), wanted=wanted), other.step(dict(call), wanted=wanted)
            for key, logits in expected.items():
                assert torch.allclose(got[key], logits, atol=1e-5)
