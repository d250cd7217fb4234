"""Runs a pipeline, a tuple of passes, and tells what each did: hits, refusals with reasons, sizes, seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from compiler.ir.core import Graph, walk
from compiler.ir.verify import verify
from specs.errors import SpecRTError, Where


@dataclass(frozen=True)
class Hit:
    """A rule that fired: its name, the value that it redefined, and the place in the spec that this comes from."""

    rule: str
    at: str
    where: Where | None = None

    def as_dict(self) -> dict[str, object]:
        return {"rule": self.rule, "at": self.at, "where": None if self.where is None else str(self.where)}


@dataclass(frozen=True)
class Refusal:
    """A rule that could have fired at a value and did not, and why."""

    rule: str
    at: str
    where: Where | None
    reason: str

    def __str__(self) -> str:
        place = "" if self.where is None else f" ({self.where})"
        return f"{self.rule}, %{self.at}{place}: {self.reason}"

    def as_dict(self) -> dict[str, object]:
        place = None if self.where is None else str(self.where)
        return {"rule": self.rule, "at": self.at, "where": place, "reason": self.reason}


@dataclass
class Log:
    """Where a pass writes what it did."""

    hits: list[Hit] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def hit(self, rule: str, at: str, where: Where | None = None) -> None:
        self.hits.append(Hit(rule, at, where))

    def refuse(self, rule: str, at: str, where: Where | None, reason: str) -> None:
        self.refusals.append(Refusal(rule, at, where, reason))


@dataclass(frozen=True)
class Pass:
    """A named function from graph to graph; a `required` one must fire for the target to be servable."""

    name: str
    apply: Callable[[Graph, Log], Graph]
    required: bool = False


@dataclass(frozen=True)
class PassReport:
    """What one pass did to a graph."""

    name: str
    hits: tuple[Hit, ...]
    refusals: tuple[Refusal, ...]
    equations_before: int
    equations_after: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The same content for `--json` output."""
        return {
            "name": self.name,
            "hits": [hit.as_dict() for hit in self.hits],
            "refusals": [refusal.as_dict() for refusal in self.refusals],
            "equations_before": self.equations_before,
            "equations_after": self.equations_after,
            "seconds": self.seconds,
        }


def run_passes(graph: Graph, passes: Sequence[Pass], dump: Path | None = None) -> tuple[Graph, tuple[PassReport, ...]]:
    """The graph after every pass in order, each verified, with a report for each; `dump` gets `NN_pass.ir` files.

    Raises SpecRTError IR-003 where a pass broke the graph, PASS-001 where a required pass found nothing to do, and
    PASS-003 where `dump` can't be written.
    """
    verify(graph)
    _dump(dump, 0, "input", graph)
    reports: list[PassReport] = []
    for number, item in enumerate(passes, start=1):
        log, before, start = Log(), count_equations(graph), perf_counter()
        graph = item.apply(graph, log)
        verify(graph, after=item.name)
        seconds = perf_counter() - start
        hits, refusals = tuple(log.hits), tuple(log.refusals)
        reports.append(PassReport(item.name, hits, refusals, before, count_equations(graph), seconds))
        _dump(dump, number, item.name, graph)
        if item.required and not hits:
            raise _unmet(graph, reports)
    return graph, tuple(reports)


def count_equations(graph: Graph) -> int:
    """The number of equations, the body of a `repeat` counted once."""
    return sum(1 for _ in walk(graph.equations))


def _unmet(graph: Graph, reports: Sequence[PassReport]) -> SpecRTError:
    last = reports[-1]
    reasons = [f"{report.name}: {refusal}" for report in reports for refusal in report.refusals]
    where = next((refusal.where for refusal in last.refusals if refusal.where is not None), None)
    return SpecRTError(
        "PASS-001",
        f"`{last.name}` did not apply to graph `{graph.name}`, and this target needs it",
        where=where,
        hint="each line above is a rule and the reason why it did not fire; the first is usually the cause",
        notes=reasons or [f"{last.name}: nothing in the graph is what it looks for"],
    )


def _dump(directory: Path | None, number: int, name: str, graph: Graph) -> None:
    if directory is None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{number:02d}_{name}.ir").write_text(str(graph), encoding="utf-8")
    except OSError as error:
        message = f"can't write the graph after `{name}` to {directory}: {error.strerror}"
        raise SpecRTError("PASS-003", message, hint="name a directory that you may write to") from error
