"""The rows of a report: from specs and checkpoints as a user names them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compiler.api import request
from compiler.validate.emulate import Subject
from compiler.validate.matrix import Model
from specs.deployment import is_deployment
from specs.errors import SpecRTError
from specs.matrix import Matrix
from specs.schema import load_spec

MODELS = Path(__file__).resolve().parents[2] / "specs" / "models"
OURS = ("tiny", "demo")  # sizes that nobody publishes
ROW = 256  # tokens in a row of text
ROWS = 8


def all_models() -> list[Model]:
    """One for each spec that comes with SpecRT and has a tiny size: random weights, judged on random ids."""
    return [_of_spec(path, "tiny") for path in sorted(MODELS.glob("*.yaml")) if "tiny" in load_spec(path).sizes]


def models_of_matrix(matrix: Matrix) -> list[Model]:
    """Its rows, each the tiny size of a spec with random weights, told as the published size."""
    rows = matrix.rows.items()
    return [
        Model(name, name, Subject(MODELS / f"{row.spec}.yaml", "tiny"), row.size, tuple(row.had)) for name, row in rows
    ]


def model_of(source: Path, size: str | None, text: Path | None, calibration: Path | None) -> Model:
    """A spec in a size (else its tiny one), a checkpoint folder or a deployment's model, judged on `text` where given.

    Raises SpecRTError VAL-005 for a spec without that size, VAL-006 for text that gives no rows.
    """
    if source.is_file() and is_deployment(source):
        return _of_deployment(source, text, calibration)
    if source.is_file():
        chosen = size or "tiny"
        if chosen not in load_spec(source).sizes:
            known = ", ".join(load_spec(source).sizes) or "none"
            message = f"`{source}` has no size `{chosen}` to try with random weights"
            raise SpecRTError("VAL-005", message, hint=f"name one with `--size`: {known}; or give a checkpoint folder")
        return _of_spec(source, chosen)
    rows = None if text is None else rows_of(text, source)
    name = source.resolve().name
    return Model(name, name, Subject(source, rows=rows, calibration=calibration), None)


def _of_deployment(source: Path, text: Path | None, calibration: Path | None) -> Model:
    """What the file names, judged on the text of its gates and calibrated on its data where nothing else is given."""
    asked = request(source)
    text = text or (None if asked.gates is None else asked.gates.text)
    folder = asked.checkpoint or asked.source
    rows = None if text is None else rows_of(text, folder)
    subject = Subject(
        asked.source, asked.size, asked.checkpoint, rows, calibration or asked.calibration, asked.seed
    )  # fmt: skip
    return Model(source.stem, source.stem, subject, asked.size)


def _of_spec(path: Path, size: str) -> Model:
    sizes = load_spec(path).sizes
    published = next((name for name in sizes if name not in OURS), size)
    return Model(path.stem, path.stem, Subject(path, size), published)


def rows_of(text: Path, checkpoint: Path) -> tuple[tuple[int, ...], ...]:
    """Rows of 256 ids, at most 8, from a .npy of ids or a text that the checkpoint's tokenizer reads.

    Raises SpecRTError VAL-006 where the file can't be read so.
    """
    try:
        if text.suffix == ".npy":
            ids = np.load(text).reshape(-1).astype(int).tolist()
        else:
            from runtime.tokenizer import Tokenizer

            ids = Tokenizer(checkpoint / "tokenizer.json").encode(text.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecRTError("VAL-006", f"`{text}` can't be read as text or ids: {error}") from error
    rows = [tuple(ids[start : start + ROW]) for start in range(0, min(len(ids), ROW * ROWS), ROW)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise SpecRTError("VAL-006", f"`{text}` has {len(ids)} tokens, expected at least 2")
    return tuple(rows)
