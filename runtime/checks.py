"""Checks of what a caller gives, the same for decoders and encoders."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.executable import Array
from specs.errors import SpecRTError


def as_array(value: object) -> Array:
    """The value as numpy sees it; lists of unequal length become objects, whose dtype no check accepts."""
    try:
        return np.asarray(value)
    except ValueError:
        return np.array(None, dtype=object)


def check_prompt(prompt: Sequence[int], max_sequence: int, vocab: int) -> None:
    """Raises SpecRTError RUN-001 (prompt is empty), RUN-002 (too long), RUN-003 (an id is out of range)."""
    if len(prompt) == 0:
        raise SpecRTError("RUN-001", "the prompt is empty", hint="give at least one token")
    if len(prompt) > max_sequence:
        message = f"the prompt has {len(prompt)} tokens, the limit is {max_sequence}"
        raise SpecRTError("RUN-002", message, hint="shorten it, or compile with a higher `max_sequence`")
    for place, token in enumerate(prompt):
        if not 0 <= token < vocab:
            message = f"token {token} at place {place} is out of range: ids go from 0 to {vocab - 1}"
            raise SpecRTError("RUN-003", message, hint="the prompt may come from the tokenizer of another model")


def check_inputs(given: Mapping[str, object], expected: Sequence[str], derived: Collection[str] = ()) -> None:
    """Raises SpecRTError RUN-004 for an unknown keyword, RUN-008 for an input of the model that is not given.

    Those in `derived` need not be given.
    """
    for name in given:
        if name not in expected:
            known = (
                f"the model's further inputs: {', '.join(expected)}" if expected else "the model has no further inputs"
            )
            raise SpecRTError("RUN-004", f"unknown keyword `{name}`", hint=known)
    for name in expected:
        if name not in given and name not in derived:
            raise SpecRTError(
                "RUN-008", f"input `{name}` is not given", hint=f"pass `{name}=`, a value for each sequence"
            )


def check_value(name: str, value: object, expected: str, accept: Callable[[Any], bool], *, whole: bool = False) -> None:
    """Raises SpecRTError RUN-020 for an option that is no number, or not an accepted one; None is no value."""
    if value is None:
        return
    kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds) or not accept(value):
        raise SpecRTError("RUN-020", f"`{name}` is {value!r}, expected {expected}")
