"""Evidence from elsewhere, as small JSON files: networks emitted against a recorded interface, runs on real GPUs.

A file has a list `records`. Each says what was shown (`level`: emitted or executed), for which model and precision, on
which GPU with which toolchain, when, with what versions, and the SHA-256 of the spec and the recipe that it used.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from specs.errors import SpecRTError, Where
from specs.precision import Recipe

_FOUND = re.compile(r", (?:rounding|range): \w+")
FIELDS = ("level", "model", "precision", "gpu", "toolchain", "date", "versions", "text", "spec", "recipe")


@dataclass(frozen=True)
class Record:
    """One thing that was shown of a model (its spec's file name); `gpu` is `any` where the chip plays no part."""

    level: str
    model: str
    precision: str
    gpu: str
    toolchain: str
    date: str
    versions: str
    text: str
    spec: str
    recipe: str

    def concerns(self, model: str, precision: str, gpu: str, toolchain: str) -> bool:
        """Whether it is about this cell."""
        return (self.model, self.precision, self.toolchain) == (model, precision, toolchain) and self.gpu in (
            "any",
            gpu,
        )


def digest(path: Path) -> str:
    """The SHA-256 of what a fact depends on in a file: no comments and blank ends, nor the bound that judges it.

    Nor how a recipe's numbers are found (tokens, ranges, rounding): what is stored and computed is the same.
    """
    lines = (line.split(" #")[0].rstrip() for line in path.read_text(encoding="utf-8").splitlines())
    kept = "\n".join(line for line in lines if line and not line.startswith(("#", "bound:", "calibration:")))
    kept = _FOUND.sub("", kept)
    return hashlib.sha256(kept.encode()).hexdigest()


def age(record: Record, spec: Path, recipe: Recipe) -> str:
    """Why a record no longer counts, or nothing."""
    changed = [
        name
        for name, known, path in (
            ("spec", record.spec, spec),
            ("recipe", record.recipe, Path(recipe.where.file)),
        )
        if path.is_file() and known != digest(path)
    ]
    return f"the {' and the '.join(changed)} changed since" if changed else ""


def read_records(folder: Path) -> Iterator[Record]:
    """All records of a folder's *.json files that have some; raises SpecRTError VAL-003 for one that lacks a field."""
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise SpecRTError(
                "VAL-003", f"{path.name} is not JSON: {error.msg}", where=Where(str(path), error.lineno)
            ) from error
        entries = content.get("records", []) if isinstance(content, dict) else []
        for number, entry in enumerate(entries):
            missing = [name for name in FIELDS if not isinstance(entry.get(name), str)]
            if missing or entry["level"] not in ("emitted", "executed"):
                told = f"lacks {', '.join(missing)}" if missing else f"has the level `{entry['level']}`"
                hint = "a record has " + ", ".join(FIELDS) + "; level is emitted or executed"
                raise SpecRTError("VAL-003", f"record {number} {told}", where=Where(str(path)), hint=hint)
            yield Record(**{name: entry[name] for name in FIELDS})
