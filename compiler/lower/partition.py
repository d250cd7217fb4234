"""Cuts a graph into maximal convex segments that one engine runs, and the steps between them.

The top-level equations form a graph of who reads whom. An equation's stage is how often the longest way to it from an
input changes between engine and step; all engine equations of one stage are one segment. No way leads out of a segment
and back (it would pass a step, and so end in a later stage): segments are convex, and run in the order of their stages.
Weights, constants and states belong to whoever reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import networkx as nx

from compiler.ir.core import Equation, Graph, Value, used_values, walk
from compiler.ir.ops import REGISTRY
from specs.errors import SpecRTError

IsStep = Callable[[Equation], bool]


@dataclass(frozen=True)
class Segment:
    """A part of a graph, itself a graph: its inputs are graph inputs or results of earlier segments."""

    kind: str  # "engine" or "step"
    graph: Graph


def partition(graph: Graph, is_step: IsStep) -> tuple[Segment, ...]:
    """Segments in an order in which they can run; raises SpecRTError LOWER-002 where a step is inside `repeat`."""
    producer = {value.name: index for index, equation in enumerate(graph.equations) for value in equation.results}
    sources = {index for index, equation in enumerate(graph.equations) if REGISTRY[equation.op].source}
    steps = {index for index, equation in enumerate(graph.equations) if _is_step(equation, is_step)}
    reads = nx.DiGraph()
    for index, equation in enumerate(graph.equations):
        if index in sources:
            continue
        reads.add_node(index)
        for value in used_values(equation):
            if (before := producer.get(value.name)) is not None and before != index and before not in sources:
                reads.add_edge(before, index)
    stages: dict[int, int] = {}
    for index in nx.topological_sort(reads):
        own = index in steps
        reached = [stages[other] + ((other in steps) != own) for other in reads.predecessors(index)]
        stages[index] = max(reached, default=int(own))
    members: dict[tuple[int, bool], list[int]] = {}
    for index in sorted(stages):
        members.setdefault((stages[index], index in steps), []).append(index)
    return tuple(
        Segment("step" if step else "engine", _subgraph(graph, chosen, producer, sources, f"{graph.name}.{number}"))
        for number, ((_, step), chosen) in enumerate(sorted(members.items()))
    )


def _is_step(equation: Equation, is_step: IsStep) -> bool:
    if equation.body is None:
        return is_step(equation)
    inside = next((inner for inner in walk(equation.body.equations) if is_step(inner)), None)
    if inside is not None:
        message = f"`{inside.op}` (%{inside.results[0].name}) needs a step, which can't be cut out of `repeat`"
        raise SpecRTError("LOWER-002", message, where=inside.where)
    return False


def _subgraph(graph: Graph, chosen: list[int], producer: dict[str, int], sources: set[int], name: str) -> Graph:
    inside = set(chosen)
    for index in chosen:
        for value in used_values(graph.equations[index]):
            if producer.get(value.name) in sources:
                inside.add(producer[value.name])
    equations = tuple(graph.equations[index] for index in sorted(inside))
    defined = {value.name for value in _definitions(equations)}
    inputs: dict[str, Value] = {}
    for equation in equations:
        for value in used_values(equation):
            if value.name not in defined:
                inputs.setdefault(value.name, value)
    order = {value.name: index for index, value in enumerate(graph.inputs)}
    ordered = sorted(inputs.values(), key=lambda value: order.get(value.name, len(order)))
    results = {
        value.name: value for equation in equations if not REGISTRY[equation.op].source for value in equation.results
    }
    outputs = [(port, value) for port, value in graph.outputs if value.name in results]
    public = {value.name for _, value in outputs}
    later = {
        value.name
        for index, equation in enumerate(graph.equations)
        if index not in inside
        for value in used_values(equation)
    }
    outputs += [(key, value) for key, value in results.items() if key in later and key not in public]
    return Graph(name, graph.dims, tuple(ordered), equations, tuple(outputs))


def _definitions(equations: tuple[Equation, ...]) -> Iterator[Value]:
    for equation in walk(equations):
        yield from equation.results
        if equation.body is not None:
            yield from equation.body.params
