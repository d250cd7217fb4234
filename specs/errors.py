"""The one exception for a user's mistake, and the place in a file that it points at.

Every message says what is wrong, where, what was expected and what to do; the command line prints it without a
traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Where:
    """A place in a text file; `line` and `column` count from 1, and None means the whole file."""

    file: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)


class SpecRTError(Exception):
    """A mistake in what the user gave (spec, checkpoint, bundle, prompt, flag), with a stable `code`.

    `notes` are further lines, printed one below the other; `str()` of the error is the whole rendered text.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        where: Where | None = None,
        hint: str | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.code, self.message, self.where, self.hint = code, message, where, hint
        self.notes = tuple(notes)
        super().__init__(self.render())

    def render(self) -> str:
        """The text shown to the user: headline, place, notes, hint."""
        lines = [f"error[{self.code}]: {self.message}"]
        if self.where is not None:
            lines.append(f"  --> {self.where}")
        lines += [f"  {note}" for note in self.notes]
        if self.hint is not None:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """The same content for `--json` output."""
        place = None
        if self.where is not None:
            place = {"file": self.where.file, "line": self.where.line, "column": self.where.column}
        return {
            "code": self.code,
            "message": self.message,
            "where": place,
            "notes": list(self.notes),
            "hint": self.hint,
        }
