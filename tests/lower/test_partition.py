"""Cutting a graph: convex, maximal, in an order that runs, and running the parts gives what the whole gives."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from compiler.ir.builder import Builder
from compiler.ir.core import Equation, Graph
from compiler.ir.interpreter import run
from compiler.ir.parser import parse
from compiler.ir.types import Sym
from compiler.ir.verify import verify
from compiler.lower.partition import Segment, partition
from tests.golden_errors import check_raises


def step_of(equation: Equation) -> str | None:
    """A backend that lacks `tanh`: each is a step of its own."""
    return equation.result.name if equation.op == "tanh" else None


def run_parts(segments: tuple[Segment, ...], graph: Graph, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    values = dict(inputs)
    weights = {"w": torch.arange(4.0)}
    for segment in segments:
        verify(segment.graph)
        given_inputs = {value.name: values[value.name] for value in segment.graph.inputs}
        outputs = run(segment.graph, given_inputs, weights.__getitem__)
        values.update((value.name, outputs[port]) for port, value in segment.graph.outputs)
    return {port: values[value.name] for port, value in graph.outputs}


def test_one_engine_runs_everything_in_one_segment() -> None:
    graph = parse(LAYERS)
    (segment,) = partition(graph, lambda _: None)
    assert segment.kind == "engine"
    assert segment.graph.equations == graph.equations
    assert segment.graph.inputs == graph.inputs
    assert segment.graph.outputs == graph.outputs


LAYERS = """graph model(%x: f32[B,4], %y: f32[B,4]) {
  dim B in 1..2..8
  %w: f32[4] = weight() {name = "w"}
  %a: f32[B,4] = add(%x, %w)
  %b: f32[B,4] = tanh(%a)
  %c: f32[B,4] = mul(%y, %w)
  %d: f32[B,4] = add(%b, %c)
  %e: f32[B,4] = tanh(%d)
  %f: f32[B,4] = add(%e, %a)
  return first = %b, last = %f
}
"""


def test_steps_cut_the_graph_where_they_must() -> None:
    graph = parse(LAYERS)
    segments = partition(graph, step_of)
    # %c waits for nothing and runs with the first segment; %w is in every segment that reads it
    members = [[equation.result.name for equation in segment.graph.equations] for segment in segments]
    assert members == [["w", "a", "c"], ["b"], ["d"], ["e"], ["f"]]
    assert [segment.kind for segment in segments] == ["engine", "step", "engine", "step", "engine"]
    inputs = {"x": torch.randn(2, 4), "y": torch.randn(2, 4)}
    expected = run(graph, inputs, {"w": torch.arange(4.0)}.__getitem__)
    for port, tensor in run_parts(segments, graph, inputs).items():
        assert torch.equal(tensor, expected[port])


LOOKUP = """graph model(%x: f32[T,4], %at: i32[N]) {
  dim T in 1..2..8
  dim N in 1..1..8
  %a: f32[T,4] = add(%x, 1.0)
  %rows: f32[N,4] = gather(%a, %at)
  %b: f32[T,4] = tanh(%a)
  %more: f32[N,4] = gather(%b, %at)
  %c: f32[N,4] = add(%rows, %more)
  return c = %c
}
"""


def test_rows_are_looked_up_where_they_are_read() -> None:
    segments = partition(parse(LOOKUP), step_of)
    members = [[equation.result.name for equation in segment.graph.equations] for segment in segments]
    assert members == [["a"], ["b"], ["rows", "more", "c"]]


INSIDE = """graph model(%x: f32[B,4]) {
  dim B in 1..2..8
  %y: f32[B,4] = repeat(%x) {count = 2} (%i: f32[B,4]) => {
    %a: f32[B,4] = tanh(%i) @ specs/models/model.yaml:9:5
    yield %a
  }
  return y = %y
}
"""


def test_a_step_inside_repeat_is_refused() -> None:
    check_raises("LOWER-002", partition, parse(INSIDE), step_of)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Random graphs of engine operations and steps."""
    b = Builder()
    values = [b.input("x", "f32", "B", 4)]
    inputs = list(values)
    for index in range(draw(st.integers(1, 14))):
        first = values[draw(st.integers(0, len(values) - 1))]
        second = values[draw(st.integers(0, len(values) - 1))]
        if draw(st.booleans()):
            values.append(b.emit("tanh", first, to=f"t{index}"))
        else:
            values.append(b.emit("add", first, second, to=f"a{index}"))
    chosen = draw(st.lists(st.sampled_from(values[1:]), min_size=1, max_size=3, unique_by=lambda value: value.name))
    return b.graph("model", [Sym("B", 1, 2, 8)], inputs, [(f"out{i}", value) for i, value in enumerate(chosen)])


@given(graphs())
def test_any_cut_computes_the_same(graph: Graph) -> None:
    segments = partition(graph, step_of)
    inputs = {"x": torch.linspace(-1, 1, 8).reshape(2, 4)}
    expected = run(graph, inputs, {}.__getitem__)
    for port, tensor in run_parts(segments, graph, inputs).items():
        assert torch.equal(tensor, expected[port])
    kinds = [segment.kind for segment in segments]
    assert ("engine", "engine") not in set(pairwise(kinds)), "neighbours: not maximal"
    assert kinds.count("step") == sum(equation.op == "tanh" for equation in graph.equations)
