"""The text of a draft: YAML lines with `# CHECK:` comments above what they are about."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*$")
_READ_OTHERWISE = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


def yaml_text(value: Any) -> str:
    """A JSON value in YAML's one-line style, as the spec loader reads it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str):
        return value if _WORD.match(value) and value.lower() not in _READ_OTHERWISE else json.dumps(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(yaml_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{yaml_text(key)}: {yaml_text(item)}" for key, item in value.items()) + "}"
    return number_text(value)


def number_text(value: float) -> str:
    """`1.0e-5`: a number that YAML 1.1 and 1.2 read alike."""
    text = repr(value)
    if "e" not in text:
        return text
    mantissa, exponent = text.split("e")
    sign, digits = exponent[:1], exponent[1:] if exponent[0] in "+-" else exponent
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign if sign in '+-' else '+'}{digits.lstrip('0')}"


@dataclass
class Page:
    """Lines, and where the checks stand among them."""

    lines: list[str] = field(default_factory=list)
    checks: list[tuple[int, str, str]] = field(default_factory=list)  # line, about, text

    def put(self, line: str, about: str = "", checks: Sequence[str] = ()) -> None:
        """A line, with a comment above it for each check."""
        indent = " " * (len(line) - len(line.lstrip()))
        for text in checks:
            self.lines.append(f"{indent}# CHECK: {text}")
            self.checks.append((len(self.lines), about, text))
        self.lines.append(line)

    def include(self, other: Page) -> None:
        """The lines of another page."""
        self.checks += [(line + len(self.lines), about, text) for line, about, text in other.checks]
        self.lines += other.lines

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"
