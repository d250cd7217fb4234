"""Cuts a graph into maximal convex segments that one engine runs, and the steps between them.

The top-level equations form a graph of who reads whom, in which the equations of one step count as one. A node's stage
is how often the longest way to it from an input changes between engine and step; all engine equations of one stage are
one segment. No way leads out of a segment and back (it would pass a step, and so end in a later stage): segments are
convex, and run in the order of their stages. Weights, constants and states belong to whoever reads them, and so do
weights that are dequantized and constants that are cast.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

import networkx as nx

from compiler.ir.core import Equation, Graph, Value, used_values, walk
from compiler.ir.ops import REGISTRY
from specs.errors import SpecRTError

# The step that an equation belongs to, None for an engine's; the equations of a step may have no engine's between them.
StepOf = Callable[[Equation], Hashable | None]


@dataclass(frozen=True)
class Segment:
    """A part of a graph, itself a graph: its inputs are graph inputs or results of earlier segments."""

    kind: str  # "engine" or "step"
    graph: Graph


def partition(graph: Graph, step_of: StepOf) -> tuple[Segment, ...]:
    """Segments in an order in which they can run; raises SpecRTError LOWER-002 where a step is inside `repeat`."""
    cut = _Cut(graph, step_of)
    members: dict[Hashable, list[int]] = {}
    for index, stage in sorted(cut.stages().items()):
        step = cut.steps.get(index)
        members.setdefault((stage, False) if step is None else (stage, True, step), []).append(index)
    ordered = sorted(members.items(), key=lambda item: (cut.found[item[1][0]], item[1][0] in cut.steps, item[1][0]))
    return tuple(
        Segment("step" if chosen[0] in cut.steps else "engine", cut.subgraph(chosen, f"{graph.name}.{number}"))
        for number, (_, chosen) in enumerate(ordered)
    )


class _Cut:
    def __init__(self, graph: Graph, step_of: StepOf) -> None:
        self.graph = graph
        self.producer: dict[str, int] = {}
        self.readers: dict[str, set[int]] = {}
        self.steps: dict[int, Hashable] = {}
        self.found: dict[int, int] = {}  # stages
        for index, equation in enumerate(graph.equations):
            self.producer.update((value.name, index) for value in equation.results)
            for value in used_values(equation):
                self.readers.setdefault(value.name, set()).add(index)
            if (step := _step(equation, step_of)) is not None:
                self.steps[index] = step
        self.sources = self._sources()
        self.public = {value.name for _, value in graph.outputs}

    def _sources(self) -> set[int]:
        found: set[int] = set()
        for index, equation in enumerate(self.graph.equations):
            before = [self.producer.get(value.name) for value in equation.values]
            stored = equation.op == "dequantize" and all(source in found for source in before)
            if equation.op == "cast" and before[0] is not None:
                stored = self.graph.equations[before[0]].op == "const"
            found |= {index} if stored or REGISTRY[equation.op].source else set()
        return found

    def stages(self) -> dict[int, int]:
        """The stage of every equation that is no source."""
        first: dict[Hashable, int] = {}
        node = {index: first.setdefault(step, index) for index, step in self.steps.items()}
        reads = nx.DiGraph()
        for index, equation in enumerate(self.graph.equations):
            if index in self.sources:
                continue
            own = node.get(index, index)
            reads.add_node(own)
            for value in used_values(equation):
                before = self.producer.get(value.name)
                if before is not None and before not in self.sources and node.get(before, before) != own:
                    reads.add_edge(node.get(before, before), own)
        stages: dict[int, int] = {}
        for index in nx.topological_sort(reads):
            own_kind = index in self.steps
            reached = [stages[other] + ((other in self.steps) != own_kind) for other in reads.predecessors(index)]
            stages[index] = max(reached, default=int(own_kind))
        self.found = {
            index: stages[node.get(index, index)]
            for index in range(len(self.graph.equations))
            if index not in self.sources
        }
        self._delay_lookups()
        return self.found

    def _delay_lookups(self) -> None:
        """Rows are looked up where they are read: the layer that they come from stays like the others."""
        for index in reversed(range(len(self.graph.equations))):
            equation = self.graph.equations[index]
            readers = self.readers.get(equation.results[0].name, set())
            if equation.op != "gather" or index in self.steps or not readers or readers & set(self.steps):
                continue
            if equation.results[0].name not in self.public:
                self.found[index] = min(self.found[reader] for reader in readers)

    def subgraph(self, chosen: list[int], name: str) -> Graph:
        """The equations of one segment as a graph: what it reads are its inputs, what others read its outputs."""
        graph, inside, left = self.graph, set(chosen), list(chosen)
        while left:
            for value in used_values(graph.equations[left.pop()]):
                source = self.producer.get(value.name)
                if source is not None and source in self.sources and source not in inside:
                    inside.add(source)
                    left.append(source)
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
            value.name: value
            for equation in equations
            if self.producer[equation.results[0].name] not in self.sources
            for value in equation.results
        }
        outputs = [(port, value) for port, value in graph.outputs if value.name in results]
        outputs += [
            (key, value)
            for key, value in results.items()
            if key not in self.public and not self.readers.get(key, set()) <= inside
        ]
        return Graph(name, graph.dims, tuple(ordered), equations, tuple(outputs))


def _step(equation: Equation, step_of: StepOf) -> Hashable | None:
    if equation.body is None:
        return step_of(equation)
    inside = next((inner for inner in walk(equation.body.equations) if step_of(inner) is not None), None)
    if inside is not None:
        message = f"`{inside.op}` (%{inside.results[0].name}) needs a step, which can't be cut out of `repeat`"
        raise SpecRTError("LOWER-002", message, where=inside.where)
    return None


def _definitions(equations: tuple[Equation, ...]) -> Iterator[Value]:
    for equation in walk(equations):
        yield from equation.results
        if equation.body is not None:
            yield from equation.body.params
