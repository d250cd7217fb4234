"""Near names for hints: `did you mean ...`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names in `known` closest to `name`, best first; empty when none is close."""
    spelled = {other.lower(): other for other in sorted(set(known), reverse=True)}
    return [spelled[close] for close in difflib.get_close_matches(name.lower(), spelled, n=count, cutoff=0.6)]


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint naming the closest known name, or else all of them when they are few, or None."""
    known = sorted(set(known))
    close = nearest(name, known)
    if close:
        return "did you mean " + " or ".join(f"`{n}`" for n in close) + "?"
    if 0 < len(known) <= 16:
        return "known: " + ", ".join(f"`{n}`" for n in known)
    return None
