"""One sequence on its way through the engine: its tokens, its blocks, and what is wanted of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from runtime.executable import Floats
from runtime.sampling import Sampler
from specs.errors import SpecRTError

if TYPE_CHECKING:
    from runtime.beam_request import BeamRequest

Finish = Literal["stop", "length", "logits", "beams", "cancelled", "error"]


class Request:
    """A submitted prompt. `new` grows by an id at a time; `finish` says why it ended, and `error` what went wrong.

    Without a sampler no new token is wanted, but `logits` f32[len, V] of the whole prompt. A sequence of a `group` is
    one of its beams: the group chooses what it goes on with.
    """

    __slots__ = (
        "blocks", "draws", "error", "finish", "group", "inputs", "logits", "max_new_tokens", "new", "past", "plain",
        "prompt", "sampler", "serial", "stop", "tokens", "whole", "width",
    )  # fmt: skip

    def __init__(
        self,
        serial: int,
        prompt: Sequence[int],
        *,
        sampler: Sampler | None,
        max_new_tokens: int,
        stop: frozenset[int],
        inputs: Mapping[str, int],
        vocab: int,
        group: BeamRequest | None = None,
    ) -> None:
        self.serial = serial
        self.tokens = list(prompt)  # prompt and new ids
        self.prompt = len(self.tokens)  # how many of them were given
        self.new: list[int] = []
        self.past = 0  # how many of `tokens` the cache holds
        self.blocks: list[int] = []
        self.sampler, self.group = sampler, group
        self.whole = sampler is None and group is None  # logits of all tokens are wanted
        self.width = 1  # sequences that it may become
        self.plain = sampler is not None and sampler.plain  # a token is all that is wanted, of the logits as they are
        self.draws = sampler is not None and not sampler.greedy
        self.max_new_tokens = max_new_tokens
        self.stop = stop
        self.inputs = inputs
        self.finish: Finish | None = None
        self.error: SpecRTError | None = None
        self.logits = np.empty((len(self.tokens) if self.whole else 0, vocab), np.float32)

    def take(self, rows: Floats | list[int], count: int) -> bool:
        """Advance by `count` tokens, whose selected logits are `rows`; whether there is something new to see.

        Where the executable chose, `rows` is a list of the token.
        """
        self.past += count
        if self.whole:
            self.logits[self.past - count : self.past] = rows
            if self.past == len(self.tokens):
                self.finish = "logits"
            return self.finish is not None
        if self.past < len(self.tokens):
            return False
        assert self.sampler is not None  # a group's sequences don't come here with logits
        try:
            token = self.sampler.accept(rows[0]) if isinstance(rows, list) else self.sampler(rows[0])
        except SpecRTError as error:  # concerns this sequence only: the others of the batch go on
            self.error, self.finish = error, "error"
            return True
        self.tokens.append(token)
        self.new.append(token)
        if token in self.stop:
            self.finish = "stop"
        elif len(self.new) == self.max_new_tokens:
            self.finish = "length"
        return True
