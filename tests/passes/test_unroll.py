"""Writing out `repeat`: the same numbers, names that tell the round."""

from __future__ import annotations

import torch

from compiler.ir.core import walk
from compiler.ir.verify import verify
from compiler.passes.runner import Log
from compiler.passes.unroll import UNROLL, unroll
from tests.passes.graphs import Weights, batch, model, outputs, unrolled


def test_unrolled_computes_the_same() -> None:
    built = model().graph
    log = Log()
    flat = UNROLL.apply(built, log)
    verify(flat)
    assert not any(equation.body for equation in walk(flat.equations))
    assert [hit.at for hit in log.hits] == ["x.out"]
    weights, inputs = Weights(built), batch((5, 3))
    expected = outputs(built, weights, inputs)
    for name, tensor in outputs(flat, weights, inputs).items():
        assert torch.equal(tensor, expected[name])
    assert torch.equal(outputs(unrolled(built), weights, inputs)["logits"], expected["logits"])


def test_names_tell_the_round() -> None:
    flat = unroll(model().graph)
    names = [equation.results[0].name for equation in flat.equations]
    assert {"layers.0.mlp.up", "layers.1.mlp.up"} <= set(names)
    stored = [str(equation.attr["name"]) for equation in flat.equations if equation.op == "weight"]
    assert {"layers.0.mlp.up.weight", "layers.1.mlp.up.weight"} <= set(stored)
    assert unroll(flat) == flat
