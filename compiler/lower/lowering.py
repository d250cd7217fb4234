"""Lowers a graph for a target: check, cut, write every segment with its backend, write the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.ir.core import Graph
from compiler.lower.capability import check
from compiler.lower.partition import partition
from compiler.lower.plan import Plan, Step, cache_of

if TYPE_CHECKING:
    import torch

    from compiler.lower.tensorrt.options import BuildOptions

Weights = Callable[[str], "torch.Tensor"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Lowered:
    """What lowering wrote (`plan`, relative to the bundle) and with what (`toolchain`: package to version)."""

    plan: Plan
    toolchain: dict[str, str]


def lower(
    graph: Graph,
    weights: Weights | None,
    out: Path,
    *,
    target: str = "cpu",
    precision: str = "fp32",
    build: BuildOptions | None = None,
    pipeline: int = 1,
    ranks: Sequence[Graph] = (),
    progress: Progress | None = None,
) -> Lowered:
    """Write the engines and plan.json of a graph into `out`; weights are read one by one, by name.

    `target` is cpu, or a GPU's architecture as sm90, for which `build` says what engines are built from, and `pipeline`
    how many stages there are, `ranks` the graphs of those that share each product; there, without `weights`, none
    are written. Raises SpecRTError LOWER-001 where the target
    can't run an operation, LOWER-041 where there are fewer steps than stages; OSError where the disk is full.
    """
    from compiler.lower import openvino as backend

    if build is not None and target.startswith("sm"):
        from compiler.lower.tensorrt.lowering import write

        return Lowered(*write(ranks or (graph,), weights, out, build, int(target[2:]), pipeline, progress))
    assert weights is not None  # they are in the engine

    if target != backend.TARGET:
        raise ValueError(f"no backend for `{target}`")  # the caller checks what a user typed
    check(graph, backend.verdict, backend.NAME)
    steps = []
    engines = partition(graph, backend.step_of)
    (out / "engine").mkdir(parents=True, exist_ok=True)
    for number, segment in enumerate(engines):
        if segment.kind != "engine":
            raise AssertionError(f"{backend.NAME} states a step that it can't write: {segment.graph.name}")
        file = f"engine/{number}.xml"
        backend.write_segment(segment.graph, weights, out / file, progress)
        inputs = {value.name: value.name for value in segment.graph.inputs}
        outputs = {port: value.name for port, value in segment.graph.outputs}
        steps.append(Step(backend.NAME, file, inputs, outputs, backend.config(precision, segment.graph)))
    plan = Plan(graph.dims, graph.inputs, tuple(steps), graph.outputs, cache_of(graph))
    plan.write(out / "plan.json")
    return Lowered(plan, backend.toolchain())
