"""A captured step has launches that overlap where that was measured to be faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


class Timed:
    """A device whose graphs take a stated time: by whether their launches overlap, which is all that they are."""

    def __init__(self, times: dict[bool, float], overlaps: bool) -> None:
        self.times, self.overlaps, self.overlap = times, overlaps, False
        self.replayed = False
        self.dropped: list[bool] = []

    def capture(self, work: Callable[[], None]) -> bool:
        work()
        return self.overlap

    def replay(self, graph: bool) -> None:
        self.replayed = graph

    def milliseconds(self, start: None, stop: None) -> float:  # noqa: ARG002
        return self.times[self.replayed]

    def event(self) -> None:
        """Only the graph matters."""

    wait = event

    def drop(self, graph: bool) -> None:
        self.dropped.append(graph)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("times", "overlaps", "best"),
    [({False: 2.0, True: 1.0}, True, True), ({False: 1.0, True: 2.0}, True, False), ({}, False, False)],
)
def test_the_faster_of_two_graphs_stays(times: dict[bool, float], overlaps: bool, best: bool) -> None:
    from runtime.cuda.batch import Shape, layout
    from runtime.cuda.graphs import Graphs, Ways
    from runtime.program import Program, Step

    device: Any = Timed(times, overlaps)
    seen: list[bool] = []
    program = Program((), (), {}, (Step("program", "cuda", "a.ir", {}, {}, {}),), {}, None)
    graphs = Graphs(device, program, Ways([lambda _: seen.append(device.overlap)], [{}]))
    call: Any = None
    graph, _ = graphs.capture(Shape(4, 4, 4, 4, 0), layout({}), call, lambda _: None)
    assert graph == best
    assert device.dropped == ([not best] if overlaps else [])
    assert seen == ([False, False, True] if overlaps else [False, False])  # the first is put into the stream
    assert device.overlap is False
    assert {name: one["way"] for name, one in graphs.choices.items()} == (
        {"step at 4": "overlap" if best else "alone"} if overlaps else {}
    )
