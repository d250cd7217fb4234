"""Inputs that follow from a sequence's tokens, by rules in the bundle's manifest: a caller need not give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specs.errors import SpecRTError


@dataclass(frozen=True)
class Rule:
    """How an input comes from the prompt; exactly one field is set.

    `first`: the place of the first of these ids that occurs, tried in order. `has`: 1 where the id occurs, else 0.
    `fill`: that number for each token. `ordinals_without`: 1, 2, ... for the tokens that are not this id, 0 for it.
    """

    first: tuple[int, ...] = ()
    has: int | None = None
    fill: int | None = None
    ordinals_without: int | None = None

    def apply(self, name: str, tokens: Sequence[int]) -> Any:
        """The input `name` of a prompt: a number, or one for each token. Raises SpecRTError RUN-017."""
        if self.has is not None:
            return int(self.has in tokens)
        if self.fill is not None:
            return [self.fill] * len(tokens)
        if self.ordinals_without is not None:
            return _ordinals(tokens, self.ordinals_without)
        for token in self.first:
            if token in tokens:
                return tokens.index(token)
        wanted = " or ".join(map(str, self.first))
        raise SpecRTError(
            "RUN-017",
            f"the prompt has no token {wanted}, from whose place the model's input `{name}` follows",
            hint=f"the model's tokenizer puts it there; or pass `{name}=`, a value for each sequence",
        )


def _ordinals(tokens: Sequence[int], without: int) -> list[int]:
    count, found = 0, []
    for token in tokens:
        count += token != without
        found.append(count if token != without else 0)
    return found


Rules = Mapping[str, Rule]


def read_rules(content: Any) -> dict[str, Rule]:
    """The manifest's `derive`; raises TypeError or ValueError where it is not what this runtime knows."""
    return {str(name): _rule(name, entry) for name, entry in content.items()}


def _rule(name: str, entry: Mapping[str, Any]) -> Rule:
    ((kind, value),) = entry.items()
    if kind == "first":
        return Rule(first=tuple(int(token) for token in value))
    if kind == "has":
        return Rule(has=int(value))
    if kind == "fill":
        return Rule(fill=int(value))
    if kind == "ordinals_without":
        return Rule(ordinals_without=int(value))
    raise ValueError(f"`derive` of `{name}` has the unknown rule `{kind}`")
