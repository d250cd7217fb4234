"""Cuts a finished graph for a GPU: engine segments, attention kernels between them, and tensors to store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from compiler.ir.core import Equation, Graph, Value
from compiler.lower.attention_step import AttentionStep, attention_steps
from compiler.lower.partition import partition
from compiler.lower.plan import Step
from compiler.lower.segments import EngineSegment, engine_segment
from compiler.lower.stored_weights import Tensor, store
from compiler.passes.unroll import unroll

NAME = "tensorrt"


@dataclass(frozen=True)
class Cut:
    """A graph in pieces: `steps` in order, a segment for each digest, what is stored, and all values between steps."""

    graph: Graph  # without `repeat`, its weights as they are stored
    steps: tuple[Step, ...]
    segments: Mapping[str, EngineSegment]
    tensors: Mapping[str, Tensor]
    values: tuple[Value, ...]


def cut(graph: Graph, *, baked: bool = False) -> Cut:
    """The pieces of a graph after its passes; `baked` keeps weights inside of segments, which then differ by layer."""
    whole, tensors = store(unroll(graph))
    kernels = attention_steps(whole)
    owner = {
        equation.results[0].name: name
        for name, kernel in kernels.items()
        for equation in (kernel.equation, *kernel.absorbed)
    }
    stored = {eq.result.name: str(eq.attr["name"]) for eq in whole.equations if eq.op == "weight"}
    states = {eq.result.name: str(eq.attr["name"]) for eq in whole.equations if eq.op == "state"}
    steps: list[Step] = []
    segments: dict[str, EngineSegment] = {}
    for part in partition(whole, lambda equation: owner.get(equation.results[0].name)):
        if part.kind == "step":
            kernel = _kernel(part.graph, kernels)
            steps.append(kernel.step(stored, states))
            continue
        segment = engine_segment(part.graph, baked=baked)
        segments.setdefault(segment.digest, segment)
        steps.append(_engine_step(segment, segments[segment.digest]))
    order = {name: index for index, name in enumerate(_weights_in_order(steps))}
    if baked:
        order = {name: index for index, name in enumerate(tensors)}
    used = {name: tensors[name] for name in sorted(order, key=order.__getitem__)}
    return Cut(whole, tuple(steps), segments, used, _values(whole, steps))


def _kernel(graph: Graph, kernels: Mapping[str, AttentionStep]) -> AttentionStep:
    (name,) = (equation.result.name for equation in graph.equations if equation.op == "paged_attention")
    return kernels[name]


def _engine_step(here: EngineSegment, shared: EngineSegment) -> Step:
    """The step, with the port names of the segment that came first; ports of equal segments are in the same order."""
    inputs = dict(zip((value.name for value in shared.graph.inputs), here.inputs.values(), strict=True))
    outputs = dict(zip((port for port, _ in shared.graph.outputs), here.outputs.values(), strict=True))
    return Step(NAME, shared.file, inputs, outputs)


def _weights_in_order(steps: list[Step]) -> list[str]:
    found = {
        name.removeprefix("weight:"): None
        for step in steps
        for name in step.inputs.values()
        if name.startswith("weight:")
    }
    return list(found)


def _values(graph: Graph, steps: list[Step]) -> tuple[Value, ...]:
    known = {value.name: value for value in graph.inputs}
    known |= {value.name: value for equation in graph.equations for value in equation.results}
    names: dict[str, None] = dict.fromkeys(value.name for value in graph.inputs)
    for step in steps:
        for name in (*step.inputs.values(), *step.outputs.values()):
            if ":" not in name:  # no weight and no cache
                names[name] = None
    names.update((value.name, None) for _, value in graph.outputs)
    return tuple(known[name] for name in names)


def engine_equations(pieces: Cut) -> tuple[Equation, ...]:
    """The equations of all distinct segments: what an engine must be able to compute."""
    return tuple(equation for segment in pieces.segments.values() for equation in segment.graph.equations)
