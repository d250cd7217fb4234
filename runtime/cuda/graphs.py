"""Whole steps as CUDA graphs, one for each shape of batch: one launch where there were hundreds.

Before a shape is captured each segment is timed both ways, as an engine and as kernels for few rows, and the graph gets
the faster; the arrays of a batch are copied to the device as the first node of its graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.cuda.batch import Layout, Shape
from runtime.cuda.driver import Device
from runtime.cuda.steps import Call, Enqueue
from runtime.program import Program


@dataclass(frozen=True)
class Ways:
    """How each step can be done: as the plan says, and by kernels for so many rows."""

    plain: Sequence[Enqueue]
    few: Sequence[Mapping[int, Enqueue]]


class Graphs:
    """Captured steps by shape. `choices` says what was measured for each segment and shape."""

    def __init__(self, device: Device, program: Program, ways: Ways) -> None:
        self._device, self._program, self._ways = device, program, ways
        self._made: dict[Shape, tuple[Any, Layout]] = {}
        self._seen: set[Shape] = set()
        self.choices: dict[str, dict[str, Any]] = {}

    def __getitem__(self, shape: Shape) -> tuple[Any, Layout] | None:
        return self._made.get(shape)

    def again(self, shape: Shape) -> bool:
        """Whether a shape was asked for before: one that comes once is not worth capturing."""
        seen = shape in self._seen
        self._seen.add(shape)
        return seen

    def capture(self, shape: Shape, layout: Layout, call: Call, before: Enqueue, after: Enqueue) -> tuple[Any, Layout]:
        """Make the graph of a shape: `before`, the steps, `after`.

        The call's arrays must be those of a batch in which nobody takes part: everything is run several times.
        """
        work = [before, *self._ways.plain, after]
        for step in work:  # an engine must have seen its shapes before it is captured
            step(call)
        self._device.wait()
        chosen = [before, *self._fastest(shape, call), after]
        graph = self._device.capture(lambda: _all(chosen, call))
        self._made[shape] = (graph, layout)
        return graph, layout

    def _fastest(self, shape: Shape, call: Call) -> list[Enqueue]:
        """For each segment the way that takes less time over all its layers."""
        steps = self._program.steps
        chosen = list(self._ways.plain)
        for file in {step.file: None for step in steps if step.kind == "engine"}:
            where = [index for index, step in enumerate(steps) if step.file == file]
            ways = {"engine": [self._ways.plain[index] for index in where]}
            fitting = [rows for rows in self._ways.few[where[0]] if rows >= shape.tokens]
            if fitting:
                ways["rows"] = [self._ways.few[index][min(fitting)] for index in where]
            times = {name: self._time(way, call) for name, way in ways.items()} if len(ways) > 1 else {"engine": 0.0}
            best = min(times, key=times.__getitem__)
            for index, one in zip(where, ways[best], strict=True):
                chosen[index] = one
            if len(ways) > 1:
                self.choices[f"{file} at {shape.tokens}"] = {"way": best, "milliseconds": times}
        return chosen

    def _time(self, way: Sequence[Enqueue], call: Call) -> float:
        """Milliseconds of some steps as a graph: the least of three."""
        graph = self._device.capture(lambda: _all(way, call))
        self._device.replay(graph)
        found = [self._replay_time(graph) for _ in range(3)]
        self._device.drop(graph)
        return min(found)

    def _replay_time(self, graph: Any) -> float:
        """Milliseconds of one replay, alone."""
        start = self._device.event()
        self._device.replay(graph)
        return self._device.milliseconds(start, self._device.event())


def _all(steps: Sequence[Enqueue], call: Call) -> None:
    for step in steps:
        step(call)
