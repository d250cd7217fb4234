"""Beam search: which beams go on with which tokens, what has ended, and when nothing better can come.

Order, formulas and constants are those of `_beam_search` in transformers 5 (generation/utils.py), in float32 as there,
for one prompt: there prompts of a batch end together, and what a prompt that is done computes after that changes
nothing. The penalty on repetition works on logarithms of probabilities, as there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from runtime.checks import check_value
from runtime.executable import Floats
from runtime.sampling import not_numbers, penalize
from specs.errors import SpecRTError

_NEVER = np.float32(-1e9)  # the score of what must not be chosen
_POWERS = 87  # natural logarithm of the largest float32, and less than that of the least
Indices = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Beams:
    """How a search is done; names and meaning are those of GenerationConfig in transformers. One beam is no search.

    Raises SpecRTError RUN-020 for a value that means nothing.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        check_value("num_beams", self.num_beams, "a whole number from 1 up", lambda x: x >= 1, whole=True)
        check_value("length_penalty", self.length_penalty, "a finite number", math.isfinite)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise SpecRTError(
                "RUN-020", f'`early_stopping` is {self.early_stopping!r}, expected True, False or "never"'
            )
        expected = f"a whole number from 1 to `num_beams`, {self.num_beams}"
        count = self.num_return_sequences
        check_value("num_return_sequences", count, expected, lambda x: 1 <= x <= self.num_beams, whole=True)


@dataclass(frozen=True)
class Hypothesis:
    """Ids that a search found, with a stop token where one ended them.

    `score` is the sum of the logarithms of their probabilities over length ** length_penalty.
    """

    ids: list[int]
    score: float
    finish: Literal["stop", "length"]


class BeamSearch:
    """The search behind one prompt, step by step."""

    def __init__(
        self,
        beams: Beams,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        stop: Collection[int],
        repetition_penalty: float | None = None,
    ) -> None:
        """Raises SpecRTError RUN-020 for a `length_penalty` whose power of `max_new_tokens` is no float32."""
        self.beams, self._stop, self._most = beams, frozenset(stop), max_new_tokens
        power = beams.length_penalty * math.log(max_new_tokens)
        if abs(power) > _POWERS:
            what = f"`length_penalty` is {beams.length_penalty}, too far from 0 for {max_new_tokens} new tokens"
            raise SpecRTError("RUN-020", what, hint="scores are divided by length ** length_penalty, in float32")
        self._penalty = None if repetition_penalty in (None, 1) else repetition_penalty
        self._prompt, self._length = list(prompt), 0
        count = beams.num_beams
        self.ids: list[list[int]] = [[] for _ in range(count)]  # of the beams that go on
        # All but the first begin where nobody chooses them: the first tokens are those of one beam.
        self._scores = np.full(count, _NEVER, np.float32)
        self._scores[0] = 0
        self._ended: list[list[int]] = [[] for _ in range(count)]  # the best that have, and are there, in order
        self._ended_scores = np.full(count, _NEVER, np.float32)
        self._there = np.zeros(count, np.bool_)
        self._improvable = True

    def advance(self, logits: Floats) -> list[tuple[int, int]]:
        """Choose from logits f32[beams, V], at first f32[1, V]: for each beam the one it goes on from, and its token.

        None are chosen where the search has ended. Raises SpecRTError RUN-030 for NaN.
        """
        count, vocab = self.beams.num_beams, logits.shape[-1]
        totals = (self._odds(logits) + self._scores[:, None]).reshape(-1)
        # so many that `count` go on even if each beam's best are all stop tokens
        top = _top(totals, min(max(2, 1 + len(self._stop)) * count, totals.size))
        values: Floats = totals[top]
        parents, tokens = (top // vocab).tolist(), (top % vocab).tolist()
        self._length += 1
        ends = np.array([token in self._stop or self._length == self._most for token in tokens])
        running: Floats = np.where(ends, values + _NEVER, values)
        chosen = _top(running, count).tolist()
        found = [[*self.ids[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        self._keep(found, values, ends)
        self.ids = [found[place] for place in chosen]
        self._scores = running[chosen]
        if not self._goes_on() or ends.all():
            return []
        return [(parents[place], tokens[place]) for place in chosen]

    def best(self) -> list[Hypothesis]:
        """The best `num_return_sequences` that have ended, best first."""
        found = zip(self._ended, self._ended_scores.tolist(), self._there.tolist(), strict=True)
        made = [
            Hypothesis(ids, score, "stop" if ids[-1] in self._stop else "length")
            for ids, score, there in found
            if there
        ]
        return made[: self.beams.num_return_sequences]

    def _odds(self, logits: Floats) -> Floats:
        """Logarithms of probabilities, with the penalty."""
        highest = logits.max(axis=1, keepdims=True)
        if not np.isfinite(highest).all():  # the maximum is NaN where one is
            raise not_numbers()
        odds: Floats = logits - highest
        odds -= np.log(np.exp(odds).sum(axis=1, keepdims=True))
        if self._penalty is not None:
            for row, ids in zip(odds, self.ids, strict=False):  # at first one row
                penalize(row, [*self._prompt, *ids], self._penalty)
        return odds

    def _keep(self, found: list[list[int]], values: Floats, ends: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> None:
        """Take what ended among the first `num_beams` candidates to the others that did, and keep the best."""
        count = self.beams.num_beams
        new = ends & (np.arange(len(values)) < count)
        scores: Floats = values / np.float32(float(self._length) ** self.beams.length_penalty)
        if (self.beams.early_stopping is True and self._there.all()) or not self._improvable:
            scores = scores + _NEVER
        scores = np.where(new, scores, scores + _NEVER)
        merged = np.concatenate([self._ended_scores, scores])
        best = _top(merged, count)
        everyone = [*self._ended, *found]
        self._there = np.concatenate([self._there, new])[best]
        self._ended = [everyone[place] for place in best]
        self._ended_scores = merged[best]

    def _goes_on(self) -> bool:
        """Whether what runs may become better than what has ended, as far as `early_stopping` wants to know."""
        beams = self.beams
        longest = beams.early_stopping == "never" and beams.length_penalty > 0
        length = float(self._most if longest else self._length)
        possible = self._scores[0] / np.float32(length**beams.length_penalty)
        worst = np.where(self._there, self._ended_scores.min(), _NEVER)
        self._improvable = self._improvable and bool((possible > worst).any())
        return self._improvable and not (beams.early_stopping is True and bool(self._there.all()))


def _top(values: Floats, count: int) -> Indices:
    """Places of the largest, largest first; of equal ones the first."""
    places = np.argpartition(values, values.size - count)[values.size - count :]
    order: Indices = places[np.lexsort((places, -values[places]))]
    return order
