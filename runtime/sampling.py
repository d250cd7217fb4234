"""From logits to the next token: repetition penalty, then temperature, top-k, top-p, then a draw.

Each sequence draws from a generator of its own, so that its tokens do not depend on what runs beside it. Order and
meaning are those of the logits processors in transformers (generation/logits_process.py), in float32 as there; the
draws are numpy's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.checks import check_value
from runtime.executable import Floats, Ints
from specs.errors import SpecRTError

HOW = 4  # words for each row of `how_words`
BELOW_ONE = 1 - 2**-24  # the next float32


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest, unless temperature, top_k or top_p is given and temperature is not 0.

    Raises SpecRTError RUN-020 for a value that means nothing.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_value("temperature", self.temperature, "a number from 0 (greedy) up", lambda x: 0 <= x < math.inf)
        check_value("top_k", self.top_k, "a whole number from 1 up", lambda x: x >= 1, whole=True)
        check_value("top_p", self.top_p, "a number above 0, at most 1", lambda x: 0 < x <= 1)
        check_value(
            "repetition_penalty", self.repetition_penalty, "a number above 0; 1 is none", lambda x: 0 < x < math.inf
        )
        check_value("seed", self.seed, "a whole number from 0 up", lambda x: x >= 0, whole=True)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        drawn = any(value is not None for value in (self.temperature, self.top_k, self.top_p))
        return not drawn or self.temperature == 0

    @property
    def numbers(self) -> tuple[float, int, float]:
        """Temperature, 0 for the likeliest token; top-k, 0 for all; top-p, 1 for all."""
        if self.greedy:
            return 0.0, 0, 1.0
        temperature = 1.0 if self.temperature is None else self.temperature
        return temperature, self.top_k or 0, 1.0 if self.top_p is None else self.top_p


def how_of(how: Ints, rows: int) -> Ints:
    """The words of so many rows where none, of `how`, means the likeliest token of each."""
    return how if len(how) else np.zeros(HOW * rows, np.int32)


def how_words(rows: Sequence[tuple[float, int, float, float]]) -> Ints:
    """For a device that draws: i32[R HOW], of each row its `numbers` and a random number, floats by their bits."""
    words = np.zeros((len(rows), HOW), np.int32)
    floats = words.view(np.float32)
    for place, (temperature, top_k, top_p, chance) in enumerate(rows):
        floats[place, 0], floats[place, 2] = temperature, top_p
        words[place, 1] = min(top_k, 2**31 - 1)
        floats[place, 3] = chance
    return words.reshape(-1)


class Sampler:
    """Chooses the tokens of one sequence; holds its random numbers and, for the penalty, which tokens it has seen.

    Each token has a random number of its own, so that it is the same whoever draws it, here or a device.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocab: int) -> None:
        self._sampling = sampling
        self._greedy = sampling.greedy
        self._random = None if self._greedy else np.random.default_rng(sampling.seed)
        self._chances: list[float] = []
        self._taken = 0
        self._seen = None
        if sampling.repetition_penalty not in (None, 1):
            self._seen = np.zeros(vocab, dtype=np.bool_)
            self._seen[np.asarray(prompt, dtype=np.int64)] = True

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken, of the logits as they are."""
        return self._greedy and self._seen is None

    @property
    def plain(self) -> bool:
        """Whether a token depends on its logits alone, and so can be chosen where they are."""
        return self._seen is None

    def how(self, index: int) -> tuple[float, int, float, float]:
        """What `how_words` takes, for the token `index`."""
        return (*self._sampling.numbers, 0.0 if self._random is None else self._chance(index))

    def _chance(self, index: int) -> float:
        assert self._random is not None  # only who draws asks
        while len(self._chances) <= index:  # as float32, which is what a device gets; below 1
            self._chances.append(min(float(np.float32(self._random.random())), BELOW_ONE))
        return self._chances[index]

    def accept(self, token: int) -> int:
        """The next token, which the executable chose. Raises SpecRTError RUN-030 for one below 0: a NaN."""
        if token < 0:
            raise not_numbers()
        self._taken += 1
        return token

    def __call__(self, logits: Floats) -> int:
        """The next token from logits f32[V], which stay as they are. Raises SpecRTError RUN-030 for NaN."""
        if self.greedy:
            token = int(logits.argmax())
            if logits[token] != logits[token]:  # argmax finds a NaN where there is one
                raise not_numbers()
            return token
        scores = logits.copy()
        if self._seen is not None:
            penalize(scores, self._seen, self._sampling.repetition_penalty)
        token = int(scores.argmax())
        if scores[token] != scores[token]:
            raise not_numbers()
        if self._random is not None:
            ids, weights = candidates(scores, self._sampling)
            edges = np.cumsum(weights, dtype=np.float64)
            drawn = np.searchsorted(edges, self._chance(self._taken) * edges[-1], side="right")
            token = int(ids[min(int(drawn), len(ids) - 1)])
            self._taken += 1
        if self._seen is not None:
            self._seen[token] = True
        return token


def penalize(scores: Floats, seen: Any, penalty: float | None) -> None:
    """Make scores f32[V] of tokens that were seen, by ids or as bool[V], less likely, in place."""
    chosen, by = scores[seen], np.float32(penalty)
    scores[seen] = np.where(chosen < 0, chosen * by, chosen / by)


def not_numbers() -> SpecRTError:
    """RUN-030: logits with a NaN."""
    message = "the model's logits are not numbers (NaN)"
    return SpecRTError(
        "RUN-030", message, hint="the weights may overflow in this precision: compile with `--precision fp32`"
    )


def candidates(scores: Floats, sampling: Sampling) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], Floats]:
    """The tokens that may be drawn and their probabilities, from scores f32[V] after the penalty."""
    if sampling.temperature is not None and sampling.temperature != 1:
        scores = scores / np.float32(sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < scores.size:
        kth = np.partition(scores, scores.size - sampling.top_k)[scores.size - sampling.top_k]
        ids = np.flatnonzero(scores >= kth)  # ties with the k-th stay
    else:
        ids = np.arange(scores.size)
    scores = scores[ids]
    if sampling.top_p is not None and sampling.top_p < 1:
        order = np.argsort(scores, kind="stable")
        total = np.cumsum(_softmax(scores[order]), dtype=np.float64).astype(np.float32)
        drop = total <= np.float32(1 - sampling.top_p)
        drop[-1] = False  # the likeliest always stays
        order = order[~drop]
        order.sort()  # by id again, so that a draw means the same token whatever the filters
        ids, scores = ids[order], scores[order]
    return ids, _softmax(scores)


def _softmax(scores: Floats) -> Floats:
    powers: Floats = np.exp(scores - scores.max())
    shares: Floats = powers / powers.sum()
    return shares
