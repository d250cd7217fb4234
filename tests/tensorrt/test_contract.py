"""Every family as emitted for every version: taken by its recorded API, well typed, and computing what the IR means.

Each engine is compared with the interpreter on the same inputs, then the whole plan, attention steps through the views
that they state, with the whole graph. Tolerances are relative to the largest number of the result: see UNIT.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from compiler.ir import Graph
from compiler.ir.cache_rows import CODES
from compiler.ir.interpreter import run
from compiler.ir.parser import parse
from compiler.ir.ranks import at_once
from compiler.ir.verify import verify
from compiler.lower.tensorrt.cut import Cut, cut
from compiler.lower.tensorrt.dialects import dialect
from compiler.passes.split_tensors import split_tensors
from tests.tensorrt import recorder
from tests.tensorrt.driver import RANKS, Values, packed, padded, recorded, run_plan, states_of
from tests.tensorrt.models import SPECS, Tiny, tiny

# Some units in the last place of the precision: a segment has about eight roundings in a row, a model of three layers
# thirty; sums are in another order than the interpreter's (Higham, Accuracy and Stability, 3.1).
UNIT = {"fp32": 2.0**-24, "tf32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
SEGMENT, MODEL = 16, 60
# A code on the other side of a tie is off by a step, and so is what follows: 2^-8 of a row for u8, 2^-4 of a number.
CODED = 2.0**-8
ALL = next(path for path in SPECS if path.stem == "llama")
OLDEST, NEWEST = recorder.VERSIONS[0], recorder.VERSIONS[-1]
# All families in the oldest and the newest version, one in all of them.
CASES = [
    *((path, "fp32", OLDEST) for path in SPECS),
    *((path, "fp16", version) for path in SPECS for version in (OLDEST, NEWEST)),
    *((path, "bf16", NEWEST) for path in SPECS),
    *((ALL, "fp32", version) for version in recorder.VERSIONS[1:]),
    *((ALL, precision, version) for precision in ("fp16", "bf16") for version in recorder.VERSIONS[1:-1]),
]


def close(got: torch.Tensor, expected: torch.Tensor, bound: float, what: str) -> None:
    assert got.shape == expected.shape, what
    assert got.dtype == expected.dtype, what
    if not got.is_floating_point():
        assert torch.equal(got, expected), what
        return
    size = expected.float().abs().max().clamp(min=1.0)
    off = float(((got.float() - expected.float()).abs().max() / size).item())
    assert off <= bound, f"{what}: off by {off:.3g} of {float(size):.3g}, allowed {bound:.3g}"


@pytest.mark.parametrize(("path", "precision", "version"), CASES, ids=lambda item: getattr(item, "stem", item))
def test_emitted(path: Path, precision: str, version: str) -> None:
    model = tiny(path, precision)
    pieces = cut(model.graph)
    for segment in pieces.segments.values():
        verify(segment.graph)
        assert parse(str(segment.graph)) == segment.graph
    weights = {name: tensor.make(model.weights) for name, tensor in pieces.tensors.items()}
    record = recorded(recorder.module(version), dialect(version))
    unit = UNIT[precision]
    bound = (MODEL if model.role == "encoder" else SEGMENT) * unit  # an encoder is one segment

    def engine(graph: Graph, inputs: Values) -> dict[str, torch.Tensor]:
        got, expected = record(graph, inputs), run(graph, inputs, {}.__getitem__)
        for port, tensor in got.items():
            close(tensor, expected[port], bound, f"{port} of a segment of {pieces.graph.name}")
        return got

    states, expected_states = states_of(pieces.graph), states_of(pieces.graph)
    for batch in batches(model):
        got = run_plan(pieces, batch, weights, states, engine)
        expected = run(pieces.graph, batch, weights.__getitem__, expected_states)
        for name, tensor in got.items():
            rows = batch["positions"] >= 0 if model.role == "encoder" and tensor.ndim == 3 else slice(None)
            close(tensor[rows], expected[name][rows], MODEL * unit, name)


def batches(model: Tiny) -> list[Mapping[str, torch.Tensor]]:
    if model.role == "encoder":
        return [padded(model.graph, [7, 3]), padded(model.graph, [1])]
    return [packed(model.graph, [0, 0, 0], [5, 1, 9]), packed(model.graph, [5, 1], [1, 2], seed=2)]


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_cut_computes_what_the_model_does(path: Path) -> None:
    """The graph with `repeat` and with weights as the checkpoint has them, against the plan by the interpreter."""
    model = tiny(path)
    pieces: Cut = cut(model.graph)
    weights = {name: tensor.make(model.weights) for name, tensor in pieces.tensors.items()}
    states, expected_states = states_of(pieces.graph), states_of(pieces.graph)
    for batch in batches(model):
        got = run_plan(pieces, batch, weights, states, lambda graph, inputs: run(graph, inputs, {}.__getitem__))
        expected = run(model.graph, batch, model.weights, expected_states)
        for name, tensor in got.items():
            close(tensor, expected[name], SEGMENT * UNIT["fp32"], name)
    for name, tensor in states.items():
        close(tensor.nan_to_num(7.0), expected_states[name].nan_to_num(7.0), SEGMENT * UNIT["fp32"], name)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("family", ["llama", "bloom", "gpt_neox", "gemma", "gpt_oss", "deepseek_v2", "bert"])
def test_ranks(family: str, version: str) -> None:
    """Two ranks' plans, their engines as emitted, give what the whole graph does."""
    path = next(path for path in SPECS if path.stem == family)
    whole = tiny(path)
    each = [tiny(path, "fp32", split_tensors(RANKS, rank)) for rank in range(RANKS)]
    pieces = [cut(model.graph) for model in each]
    assert pieces[0].segments.keys() == pieces[1].segments.keys()
    stored = [{name: tensor.make(whole.weights) for name, tensor in found.tensors.items()} for found in pieces]
    record = recorded(recorder.module(version), dialect(version))
    states, expected_states = [states_of(found.graph) for found in pieces], states_of(cut(whole.graph).graph)
    for batch in batches(whole):

        def one(rank: int, batch: Values = batch) -> dict[str, torch.Tensor]:
            return run_plan(pieces[rank], batch, stored[rank], states[rank], record)

        expected = run(whole.graph, batch, whole.weights, expected_states)
        for got in at_once(RANKS, one):
            for name, tensor in got.items():
                rows = batch["positions"] >= 0 if whole.role == "encoder" and tensor.ndim == 3 else slice(None)
                close(tensor[rows], expected[name][rows], MODEL * UNIT["fp32"], name)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_bigcode", "bloom", "gpt_oss", "deepseek_v2"])
def test_a_cache_of_codes_is_in_the_plan(family: str, codes: str) -> None:
    model = tiny(next(path for path in SPECS if path.stem == family), codes=codes)
    pieces = cut(model.graph)
    weights = {name: tensor.make(model.weights) for name, tensor in pieces.tensors.items()}
    states, expected_states = states_of(pieces.graph), states_of(pieces.graph)
    assert {tensor.dtype for tensor in states.values()} == {torch.uint8}
    for batch in batches(model):
        got = run_plan(pieces, batch, weights, states, lambda graph, inputs: run(graph, inputs, {}.__getitem__))
        expected = run(model.graph, batch, model.weights, expected_states)
        for name, tensor in got.items():
            close(tensor, expected[name], CODED, name)
    assert {step.attrs["codes"] for step in pieces.steps if step.kind == "kernel"} == {codes}
