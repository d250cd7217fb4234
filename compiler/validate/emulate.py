"""One model in one precision on this CPU, against the reference in float32: the numbers of a cell."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compiler.api import Prepared, compile_prepared, prepare, weights_of
from compiler.validate import reference
from compiler.validate.expect import Expected, expect, mark
from compiler.validate.metrics import agreement
from compiler.validate.trace import trace

WINDOWS = 16  # of random ids that a random model is calibrated on
SHOWN = 160  # values of a profile at most: every so many of the longer ones


@dataclass(frozen=True)
class Subject:
    """What is compiled: a source as for `compile`, with the rows of ids that it is judged on."""

    source: Path
    size: str | None = None
    checkpoint: Path | None = None
    rows: tuple[tuple[int, ...], ...] | None = None  # None: random ids
    calibration: Path | None = None
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Options of `compile` beside the precision."""
        known: dict[str, Any] = {"size": self.size, "checkpoint": self.checkpoint, "seed": self.seed}
        if self.checkpoint is None and self.source.is_file():
            known["weights"] = "random"
        return known


def emulate(
    subject: Subject, precisions: Sequence[str], threads: int | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each precision with its numbers, computed one after the other on this CPU.

    A precision that can't be compiled gives `{"error": ...}`, the mistake as `--json` shows it: what is refused in one
    must not keep the others from being known.
    """
    import runtime
    from specs.errors import SpecRTError

    plain = prepare(subject.source, **subject.options(), precision="fp32")
    weights = weights_of(plain)
    expected = expect(plain, weights, subject.rows, seed=subject.seed)
    rows = expected.rows
    for precision in precisions:
        try:
            with tempfile.TemporaryDirectory(prefix="specrt-validate-") as folder:
                options = subject.options() | {"precision": precision, "out": Path(folder) / "bundle"}
                if subject.rows is None or subject.calibration is not None:
                    options["calibration"] = subject.calibration or random_ids(plain, Path(folder), subject.seed)
                bundle = compile_prepared(prepare(subject.source, **options))
                model = runtime.load(bundle, verify=False, threads=threads)
                results = [model.forward([row])[0] for row in rows]
                numbers = _numbers(expected, results, text=subject.rows is not None)
                profile = _profile(bundle, plain, rows[0], expected.further[0])
                model.close()
        except SpecRTError as error:
            yield precision, {"error": error.as_dict()}
        else:
            yield precision, {**numbers, "profile": profile}


def random_ids(plain: Prepared, folder: Path, seed: int) -> Path:
    """Something to calibrate a random model on: other ids than those that it is judged on, marked in each window."""
    length = min(512, plain.limits.sequence)  # as recipes cut it
    windows = reference.random_rows(int(plain.source.config["vocab"]), [length] * WINDOWS, seed + 1)
    for window in windows:
        mark(window, plain)
    path = folder / "ids.npy"
    np.save(path, np.array(windows))
    return path


def _numbers(expected: Expected, results: Sequence[Mapping[str, Any]], *, text: bool) -> dict[str, Any]:
    name, rows = expected.name, expected.rows
    ours, theirs = ([np.atleast_2d(item[name]) for item in items] for items in (results, expected.outputs))
    numbers = agreement(ours, theirs, rows if text else None).as_dict()
    if name != "logits":  # no distribution over words
        numbers |= dict.fromkeys(("mean_kl", "top1", "top5"))
    tokens = sum(map(len, rows))
    what = "text" if text else "random ids"
    return {**numbers, "subject": f"`{name}` of {len(rows)} rows, {tokens} tokens of {what}"}


def _profile(bundle: Path, plain: Prepared, row: Sequence[int], further: Mapping[str, Any]) -> list[dict[str, Any]]:
    steps = trace(bundle, plain.graph, weights_of(plain), row, further).steps
    every = -(-len(steps) // SHOWN)
    return [
        {"value": step.value, "relative": step.error.relative, "place": step.place.rsplit("/", 1)[-1]}
        for step in steps[::every]
    ]
