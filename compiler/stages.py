"""The graph of a model at any stage: as built, after a pass by number or name, or as it is lowered."""

from __future__ import annotations

from dataclasses import dataclass

from compiler.api import Prepared
from compiler.ir import Graph
from specs.errors import SpecRTError


@dataclass(frozen=True)
class Stage:
    """A graph on its way: number 0 is as built, N is after the Nth pass."""

    number: int
    name: str
    graph: Graph


def stage(prepared: Prepared, wanted: str) -> Stage:
    """The stage `built`, `final`, a pass's name or a number; raises SpecRTError CLI-014 for another."""
    names = ["built", *(report.name for report in prepared.reports)]
    last = len(names) - 1
    if wanted == "final":
        return Stage(last, names[last], prepared.graph)
    if wanted.isdecimal() and int(wanted) <= last:
        number = int(wanted)
    elif wanted in names:
        number = names.index(wanted)
    else:
        listed = ", ".join(f"{index} {name}" for index, name in enumerate(names))
        raise SpecRTError("CLI-014", f"there is no stage `{wanted}`", hint=f"stages: {listed}, final")
    return Stage(number, names[number], _graph_after(prepared, number))


def _graph_after(prepared: Prepared, number: int) -> Graph:
    from compiler.passes.runner import run_passes

    return run_passes(prepared.built.graph, prepared.precision.passes(prepared.role)[:number])[0]
