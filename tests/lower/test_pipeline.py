"""Stages of a pipeline: the best cut by trying all, and what each stage of a real plan is left with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.api import default_out, prepare
from compiler.ir.core import Value
from compiler.ir.types import Sym, TensorType
from compiler.lower.pipeline import SLACK, stages_of
from compiler.lower.plan import Plan, Step, StoredWeight
from compiler.lower.tensorrt.lowering import plan_of
from runtime.program import read_program, stage_of
from specs.errors import SpecRTError
from tests.golden_errors import check_raises
from tests.precision.models import MODELS

TOKENS = Sym("T", 1, 8, 64)


def plan(sizes: Sequence[int], widths: Sequence[int], shared: int = 0) -> Plan:
    """A chain of steps with a weight of so many bytes each; the value behind each is so wide; some share a weight."""
    weights = {f"w{i}": StoredWeight(TensorType("u8", (size,)), None, size) for i, size in enumerate(sizes)}
    weights["both"] = StoredWeight(TensorType("u8", (shared,)), None, shared)
    steps = []
    for index in range(len(sizes)):
        reads = {"w": f"weight:w{index}", **({"x": f"v{index - 1}"} if index else {})}
        if index in (0, len(sizes) - 1):
            reads["shared"] = "weight:both"
        steps.append(Step("cuda", "", reads, {"y": f"v{index}"}))
    values = tuple(Value(f"v{i}", TensorType("f16", ("T", width))) for i, width in enumerate(widths))
    return Plan((TOKENS,), (), tuple(steps), (("logits", values[-1]),), None, values, weights)


Chain = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), min_size=2, max_size=8)


@settings(max_examples=150, deadline=None)
@given(chain=Chain, count=st.integers(1, 4), shared=st.integers(0, 50))
def test_the_best_cut(chain: list[tuple[int, int]], count: int, shared: int) -> None:
    sizes, widths = [size for size, _ in chain], [width for _, width in chain]
    steps = len(sizes)
    one = plan(sizes, widths, shared)
    if count > steps:
        with pytest.raises(SpecRTError, match="LOWER-041"):
            stages_of(one, count)
        return

    def fullest(cut: Sequence[int]) -> int:
        ends = (*cut[1:], steps)
        return max(
            sum(sizes[first:end]) + shared * (first == 0 or end == steps)
            for first, end in zip(cut, ends, strict=True)
        )  # fmt: skip

    def crossing(cut: Sequence[int]) -> int:
        return sum(widths[first - 1] for first in cut[1:])

    cuts = [(0, *rest) for rest in combinations(range(1, steps), count - 1)]
    least = min(map(fullest, cuts))
    found = stages_of(one, count)
    good = [cut for cut in cuts if fullest(cut) <= (1 + SLACK) * least]
    assert found in good
    assert crossing(found) == min(map(crossing, good))


def test_too_many_stages() -> None:
    check_raises("LOWER-041", stages_of, plan([1, 1, 1], [1, 1, 1]), 4)


@pytest.mark.parametrize(("spec", "precision", "count"), [("llama", "fp16", 2), ("gpt2", "w8a16", 3)])
def test_stages_of_a_model(spec: str, precision: str, count: int, tmp_path: Path) -> None:
    prepared = prepare(
        MODELS / f"{spec}.yaml", size="tiny", weights="random", max_sequence=64, max_batch=2, precision=precision,
        target="sm90", toolchain="tensorrt-8.6", pipeline_parallel=count,
    )  # fmt: skip
    assert default_out(prepared).name == f"{spec}-tiny-sm90-{precision}-pp{count}"
    plan_of(prepared.graph, prepared.options, 90, count)[1].write(tmp_path / "plan.json")
    _, whole = read_program(tmp_path / "plan.json")
    assert len(whole.stages) == count
    stages = [stage_of(whole, number) for number in range(count)]
    assert tuple(step for stage in stages for step in stage.steps) == whole.steps
    assert [stage.first for stage in stages] == list(whole.stages)
    assert whole.cache is not None
    assert tuple(layer for stage in stages for layer in stage.cache.layers) == whole.cache.layers  # type: ignore[union-attr]
    assert {name for stage in stages for name in stage.weights} == set(whole.weights)
    assert [stage.received for stage in stages] == [(), *(stage.sent for stage in stages[:-1])]
    assert [bool(stage.outputs) for stage in stages] == [False] * (count - 1) + [True]
    for stage in stages:
        known = {port.name for port in stage.inputs} | set(stage.received)
        for step in stage.steps:
            reads = {name.removeprefix("weight:") for name in step.inputs.values()}
            assert reads <= known | set(stage.weights)
            known |= set(step.outputs.values())
        assert set(stage.sent) <= known
    assert stage_of(stages[0], 0) is stages[0]
