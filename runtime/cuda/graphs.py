"""Whole steps as CUDA graphs, one for each shape of batch: one launch where there were hundreds.

Before a shape is captured each segment that has an engine and kernels is timed both ways, and the graph gets the
faster; then the whole step with launches that overlap, and without. The arrays of a batch are copied to the device
before its graph starts, from memory that changes from step to step. Batches that are no graph are put into the stream
step by step, each launch behind the end of the one before; the first of about its size times both ways of a segment, on
its own numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.cuda.batch import Layout, Shape
from runtime.cuda.driver import Device
from runtime.cuda.programs import size_for
from runtime.cuda.steps import Call, Enqueue
from runtime.program import Program

Times = Mapping[str, float]


@dataclass(frozen=True)
class Ways:
    """How each step can be done: as the plan says, and for engines by kernels for at most so many rows."""

    plain: Sequence[Enqueue]
    rows: Sequence[Mapping[int, Enqueue]]


class Graphs:
    """Captured steps by shape, and steps that are not. `choices` says what was measured for each segment and size.

    Of several ranks each measures; `agree` gives the sums of their times, by which all choose the same.
    """

    def __init__(
        self, device: Device, program: Program, ways: Ways, agree: Callable[[Times], Times] | None = None
    ) -> None:
        self._device, self._program, self._ways = device, program, ways
        self._agree = agree or (lambda times: times)
        self._made: dict[Shape, tuple[Any, Layout]] = {}
        self._seen: set[Shape] = set()
        self.choices: dict[str, dict[str, Any]] = {}
        self.trials = (False, True) if device.overlaps else (False,)  # with launches that overlap, or without
        self._eager: dict[tuple[str, int], str] = {}  # the way for a segment and a class of sizes

    def __getitem__(self, shape: Shape) -> tuple[Any, Layout] | None:
        return self._made.get(shape)

    def again(self, shape: Shape) -> bool:
        """Whether a shape was asked for before: one that comes once is not worth capturing."""
        seen = shape in self._seen
        self._seen.add(shape)
        return seen

    def capture(self, shape: Shape, layout: Layout, call: Call, after: Enqueue) -> tuple[Any, Layout]:
        """Make the graph of a shape: the steps, `after`.

        The call's arrays must be there, those of a batch in which nobody takes part: everything is run several times.
        """
        work = [*self._ways.plain, after]
        for step in work:  # an engine must have seen its shapes before it is captured
            step(call)
        self._device.wait()
        chosen = [*self._fastest(shape, call), after]
        graph = self._whole(f"step at {shape.tokens}", chosen, call)
        self._made[shape] = (graph, layout)
        return graph, layout

    def _whole(self, name: str, steps: Sequence[Enqueue], call: Call) -> Any:
        """The steps as one graph, of those that compute the same the one that takes less time."""
        graphs: dict[str, Any] = {}
        for overlap in self.trials:
            self._device.overlap = overlap
            try:
                graphs["overlap" if overlap else "alone"] = self._device.capture(lambda: _all(steps, call))
            finally:
                self._device.overlap = False
        if len(graphs) == 1:
            return graphs.popitem()[1]
        times = self._agree({way: self._least(graph) for way, graph in graphs.items()})
        best = min(times, key=times.__getitem__)
        self.choices[name] = {"way": best, "milliseconds": times}
        found = graphs.pop(best)
        for graph in graphs.values():
            self._device.drop(graph)
        return found

    def direct(self, call: Call) -> None:
        """Put every step into the stream, outside of a graph."""
        for index, plain in enumerate(self._ways.plain):
            way = plain
            if kernels := self._ways.rows[index]:
                ways = {"engine": plain, "rows": kernels[size_for(kernels, call.rows)]}
                way = ways[self._way(self._program.steps[index].file, ways, call)]
            way(call)

    def _way(self, file: str, ways: Mapping[str, Enqueue], call: Call) -> str:
        """The faster way of a segment in calls of about this size, measured once: both write the same results."""
        most = 1 << (call.rows - 1).bit_length()
        key = (file, most)
        if key not in self._eager:
            times = self._agree({name: self._stream_time(way, call) for name, way in ways.items()})
            self._eager[key] = min(times, key=times.__getitem__)
            self.choices[f"{file} up to {most}"] = {"way": self._eager[key], "milliseconds": times}
        return self._eager[key]

    def _stream_time(self, way: Enqueue, call: Call) -> float:
        """Milliseconds of a step in the stream, the mean of three after one that warms up."""
        way(call)
        start = self._device.event()
        for _ in range(3):
            way(call)
        return self._device.milliseconds(start, self._device.event()) / 3

    def _fastest(self, shape: Shape, call: Call) -> list[Enqueue]:
        """For each segment the way that takes less time over all its layers."""
        steps = self._program.steps
        chosen = list(self._ways.plain)
        for file in {step.file: None for step in steps if step.kind == "engine"}:
            where = [index for index, step in enumerate(steps) if step.file == file]
            ways = {"engine": [self._ways.plain[index] for index in where]}
            if self._ways.rows[where[0]]:
                ways["rows"] = [
                    kernels[size_for(kernels, shape.tokens)] for kernels in map(self._ways.rows.__getitem__, where)
                ]
            times = self._agree({name: self._time(way, call) for name, way in ways.items()}) if len(ways) > 1 else {}
            best = min(times, key=times.__getitem__) if times else "engine"
            for index, one in zip(where, ways[best], strict=True):
                chosen[index] = one
            if len(ways) > 1:
                self.choices[f"{file} at {shape.tokens}"] = {"way": best, "milliseconds": times}
        return chosen

    def _time(self, way: Sequence[Enqueue], call: Call) -> float:
        """Milliseconds of some steps as a graph."""
        graph = self._device.capture(lambda: _all(way, call))
        found = self._least(graph)
        self._device.drop(graph)
        return found

    def _least(self, graph: Any) -> float:
        """Milliseconds of a graph: the least of three, after one that warms up."""
        self._device.replay(graph)
        return min(self._replay_time(graph) for _ in range(3))

    def _replay_time(self, graph: Any) -> float:
        """Milliseconds of one replay, alone."""
        start = self._device.event()
        self._device.replay(graph)
        return self._device.milliseconds(start, self._device.event())


def _all(steps: Sequence[Enqueue], call: Call) -> None:
    for step in steps:
        step(call)
