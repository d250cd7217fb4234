"""What a model should give: rows of ids that it is judged on, and the reference's outputs for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compiler.api import Prepared
from compiler.manifest import derive_of
from compiler.validate import reference
from compiler.validate.metrics import Floats

if TYPE_CHECKING:
    import torch

    from compiler.ir.core import Graph

LENGTHS = (24, 9, 40)  # of the rows of random ids where no text is given


@dataclass(frozen=True)
class Expected:
    """Rows, the further inputs of each, the reference's outputs for each, and the output that is judged."""

    rows: list[list[int]]
    further: list[dict[str, Any]]
    outputs: list[dict[str, Floats]]
    name: str

    @property
    def judged(self) -> list[Floats]:
        """The judged output of each row."""
        return [item[self.name] for item in self.outputs]


def expect(
    prepared: Prepared,
    weights: Callable[[str], torch.Tensor],
    rows: Sequence[Sequence[int]] | None = None,
    *,
    seed: int = 0,
    graph: Graph | None = None,
) -> Expected:
    """The reference's outputs on `rows`, by default random ones of `seed`; of the plain equations, or of `graph`."""
    chosen = rows_for(prepared, seed) if rows is None else [list(row) for row in rows]
    rules = rules_of(prepared)
    further = [{name: rule.apply(name, row) for name, rule in rules.items()} for row in chosen]
    found = reference.outputs(prepared.built.graph if graph is None else graph, weights, chosen, further)
    return Expected(chosen, further, found, reference.main_output(list(found[0])))


def rows_for(prepared: Prepared, seed: int = 0) -> list[list[int]]:
    """Rows of random ids; where inputs follow from an id's place in the prompt, the row has that id."""
    config = prepared.source.config
    longest = min(prepared.limits.sequence, int(config.get("context") or prepared.limits.sequence))
    rows = reference.random_rows(int(config["vocab"]), [min(length, longest) for length in LENGTHS], seed)
    for row in rows:
        mark(row, prepared)
    return rows


def mark(row: list[int], prepared: Prepared) -> None:
    """Put the ids that rules look for into the middle; the rule listed last comes first, as a blank before its text."""
    marks = [rule.first[0] for rule in reversed(list(rules_of(prepared).values())) if rule.first]
    row[len(row) // 2 : len(row) // 2 + len(marks)] = marks


def marked(row: list[int], prepared: Prepared) -> list[int]:
    """A row of text as it is, or, where it lacks an id that a rule looks for, with all of them in its middle."""
    if any(rule.first and not set(rule.first) & set(row) for rule in rules_of(prepared).values()):
        row = list(row)
        mark(row, prepared)
    return row


def rules_of(prepared: Prepared) -> Mapping[str, Any]:
    """How inputs follow from the tokens of a prompt, as the runtime reads it from a manifest."""
    from runtime.derive import read_rules

    return read_rules(derive_of(prepared))
