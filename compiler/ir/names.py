"""Names of weights and states inside `repeat`: `layers.{i}.attn.k`, `layers.{2*i+1}.attn.k`."""

from __future__ import annotations

import re

_INDEX = re.compile(r"\{(?:(\d+)\*)?i(?:\+(\d+))?\}")


def expand(template: str, index: int) -> str:
    """The name in round `index` (from 0)."""
    return _INDEX.sub(lambda match: str(int(match.group(1) or 1) * index + int(match.group(2) or 0)), template)


def is_template(name: str) -> bool:
    """Whether a name depends on the round."""
    return _INDEX.search(name) is not None


def index_text(stride: int, start: int) -> str:
    """The placeholder for stride * i + start."""
    return "{" + (f"{stride}*" if stride != 1 else "") + "i" + (f"+{start}" if start else "") + "}"


def shift(template: str, start: int) -> str:
    """The template whose round 0 is round `start` of the given one."""
    return _INDEX.sub(
        lambda match: index_text(int(match.group(1) or 1), int(match.group(1) or 1) * start + int(match.group(2) or 0)),
        template,
    )
