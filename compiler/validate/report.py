"""The content of a report: cells of model x precision x GPU x toolchain, each with level, reason, numbers, evidence.

`report.json` is this content (schema 1, docs/validate.md); the page and report.md are drawn from it and from nothing
else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1
CPU = "cpu"  # the place of what ran here, beside the GPUs


@dataclass(frozen=True)
class Level:
    """How a cell is known; each level includes the ones before it."""

    name: str
    title: str
    meaning: str


LEVELS = (
    Level("refused", "No", "The data says that it can't run there; the reason says what could."),
    Level("declared", "Declared", "The data says that it can run there; nobody has looked at its numbers here."),
    Level("emulated", "Emulated", "Its numbers were computed on a CPU and are within the recipe's bound of float32's."),
    Level(
        "emitted",
        "Emitted",
        "Also, its network was emitted and checked against the recorded interface of that TensorRT.",
    ),
    Level("executed", "Executed", "It ran on that GPU with that toolchain; when, and how far off, stands beside it."),
)
RANK = {level.name: number for number, level in enumerate(LEVELS)}


@dataclass(frozen=True)
class Cell:
    """One place of the matrix; `evidence` are numbers of entries of the report's list."""

    model: str
    precision: str
    gpu: str
    toolchain: str
    level: str
    code: str
    reason: str
    evidence: tuple[int, ...] = ()
    stale: bool = False


@dataclass(frozen=True)
class Evidence:
    """One thing that was run, when and with what; `stale` says why it no longer counts, or is empty."""

    level: str
    date: str
    versions: str
    text: str
    stale: str = ""


@dataclass
class Report:
    """Everything that a page shows; dicts are as in docs/validate.md."""

    title: str
    about: str
    date: str
    versions: str
    command: str  # that made the report
    again: str  # that makes one cell again: {source}, {precision}, {gpu} and {toolchain} stand for its own
    models: list[dict[str, Any]] = field(default_factory=list)
    precisions: list[dict[str, Any]] = field(default_factory=list)
    gpus: list[dict[str, Any]] = field(default_factory=list)
    toolchains: list[dict[str, Any]] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    evidence: list[Evidence] = field(default_factory=list)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)  # "model|precision"
    fits: dict[str, dict[str, Any]] = field(default_factory=dict)  # "model|precision": part: a Fit

    def as_dict(self) -> dict[str, Any]:
        """The content of report.json; what is not a finite number is null."""
        content = {"schema": SCHEMA, "levels": [asdict(level) for level in LEVELS], **asdict(self)}
        cleaned: dict[str, Any] = finite(content)
        return cleaned

    def best(self) -> dict[tuple[str, str], Cell]:
        """The best known cell of each model and precision, over GPUs (not the CPU, where all run) and toolchains."""
        found: dict[tuple[str, str], Cell] = {}
        for cell in self.cells:
            if cell.gpu == CPU:
                continue
            key = (cell.model, cell.precision)
            if key not in found or RANK[cell.level] > RANK[found[key].level]:
                found[key] = cell
        return found

    def totals(self) -> dict[str, int]:
        """How many model x precision places each level has, by the best of their cells."""
        counts = dict.fromkeys(RANK, 0)
        for cell in self.best().values():
            counts[cell.level] += 1
        return counts


def finite(content: Any) -> Any:
    """The same with null for NaN and infinities, which JSON does not have."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return content


def markdown(content: Mapping[str, Any]) -> str:
    """report.md: totals, and the matrix of the best known levels with the mean KL divergence from float32."""
    levels = {level["name"]: level["title"] for level in content["levels"]}
    rank = {name: number for number, name in enumerate(levels)}
    best: dict[tuple[str, str], Mapping[str, Any]] = {}
    for cell in content["cells"]:
        if cell["gpu"] == CPU:
            continue
        key = (cell["model"], cell["precision"])
        if key not in best or rank[cell["level"]] > rank[best[key]["level"]]:
            best[key] = cell
    counts = {name: sum(cell["level"] == name for cell in best.values()) for name in levels}
    lines = [
        f"# {content['title']}", "", content["about"], "",
        f"{content['date']}; {content['versions']}; `{content['command']}`", "",
        "| level | model × precision | |", "|---|---|---|",
        *(f"| {level['title']} | {counts[level['name']]} | {level['meaning']} |" for level in content["levels"]), "",
        "| model | " + " | ".join(item["title"] for item in content["precisions"]) + " |",
        "|---|" + "---|" * len(content["precisions"]),
    ]  # fmt: skip
    for model in content["models"]:
        texts = []
        for precision in content["precisions"]:
            cell = best.get((model["name"], precision["name"]))
            kl = content["numbers"].get(f"{model['name']}|{precision['name']}", {}).get("mean_kl")
            number = "" if kl is None else f" {kl:.1e}"
            texts.append("" if cell is None else levels[cell["level"]] + number)
        lines.append(f"| {model['title']} | " + " | ".join(texts) + " |")
    lines += ["", "A number is the mean KL divergence from float32, in nats.", ""]
    reasons = _reasons(content["cells"])
    if reasons:
        lines += ["## Why not", "", *(f"- `{code}`: {reason} ({count} cells)" for code, reason, count in reasons), ""]
    return "\n".join(lines)


def _reasons(cells: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, int]]:
    """Why cells are refused, the most frequent first."""
    counts: dict[tuple[str, str], int] = {}
    for cell in cells:
        if cell["level"] == "refused":
            key = (cell["code"], cell["reason"])
            counts[key] = counts.get(key, 0) + 1
    return [(*key, count) for key, count in sorted(counts.items(), key=lambda item: -item[1])]
