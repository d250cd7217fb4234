"""A prompt with several beams on their way through the engine: which sequences they are, and which blocks they share.

Each beam is a sequence of the scheduler. Where two go on from one, the first goes on in its place, the other reads the
same full blocks and gets a copy of the last, partial one: only full blocks are shared, and nobody writes those. All
that the beams can come to hold is set aside when the prompt is admitted: they never wait for each other, and are never
preempted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from runtime.beam_search import BeamSearch, Hypothesis
from runtime.cache import BlockAllocator, Reserve
from runtime.executable import Floats
from runtime.request import Finish, Request
from specs.errors import SpecRTError

_NO_SERIAL = 0  # numbers are for sequences whose tokens a device hands on by itself


class BeamRequest:
    """A submitted prompt whose continuations are searched; `found`, best first, is there once `finish` says `beams`."""

    def __init__(
        self, prompt: Sequence[int], search: BeamSearch, inputs: Mapping[str, int], *, block_size: int, most: int
    ) -> None:
        """For at most so many new tokens."""
        self._search, self._block_size = search, block_size
        self.new: list[int] = []  # no id is certain before the end
        self.found: list[Hypothesis] = []
        self.finish: Finish | None = None
        self.error: SpecRTError | None = None
        first = Request(
            _NO_SERIAL, prompt, sampler=None, max_new_tokens=0, stop=frozenset(), inputs=inputs, vocab=0, group=self
        )
        first.width = search.beams.num_beams
        self.seats = [first]  # the sequences; a beam takes the place of one that ended
        self._at = [0] * search.beams.num_beams  # the seat of each beam
        self._reserve: Reserve | None = None
        # What all beams together may come to hold; the last token of each is never computed.
        full, each = len(prompt) // block_size, -(-(len(prompt) + most - 1) // block_size)
        self.most_blocks = full + search.beams.num_beams * (each - full)

    @property
    def first(self) -> Request:
        """The sequence of the prompt."""
        return self.seats[0]

    def admit(self, allocator: BlockAllocator) -> None:
        """Set blocks aside; there must be `most_blocks`."""
        self._reserve = Reserve(allocator, self.most_blocks)

    def take(self, count: int) -> list[int]:
        """Blocks for one of the sequences."""
        assert self._reserve is not None  # they run
        return self._reserve.take(count)

    def advance(self, logits: Mapping[Request, Floats]) -> list[tuple[int, int]]:
        """Put the beams where they go on, from logits f32[V] of each seat; gives blocks and those to copy them to.

        `finish` is set where the search has ended, or can't go on.
        """
        rows = self.seats if len(self.seats) == 1 else [self.seats[seat] for seat in self._at]
        try:
            chosen = self._search.advance(np.stack([logits[request] for request in rows]))
        except SpecRTError as error:  # concerns this prompt only
            self.error, self.finish = error, "error"
            return []
        if not chosen:
            self.found, self.finish = self._search.best(), "beams"
            return []
        for request in self.seats:
            request.past = len(request.tokens)
        return self._place([(self._at[parent], token) for parent, token in chosen])

    def close(self) -> None:
        """Put all blocks back, once `finish` says why it ends."""
        for request in self.seats:
            request.finish = self.finish
            self._leave(request)
        if self._reserve is not None:
            self._reserve.close()

    def _place(self, chosen: list[tuple[int, int]]) -> list[tuple[int, int]]:
        stay: dict[int, int] = {}  # seat: the first beam that goes on from it
        for beam, (seat, _) in enumerate(chosen):
            stay.setdefault(seat, beam)
        empty = [seat for seat in range(len(chosen)) if seat not in stay]
        for seat in empty:
            if seat < len(self.seats):
                self._leave(self.seats[seat])
        copies: list[tuple[int, int]] = []
        self._at = []
        for beam, (seat, _) in enumerate(chosen):
            place = seat
            if stay[seat] != beam:
                place = empty.pop(0)
                self.seats[place : place + 1] = [self._fork(self.seats[seat], copies)]
            self._at.append(place)
        for place, (_, token) in zip(self._at, chosen, strict=True):
            self.seats[place].tokens.append(token)
        self.first.width = 1
        return copies

    def _fork(self, parent: Request, copies: list[tuple[int, int]]) -> Request:
        """A sequence that stands where another does."""
        child = Request(
            _NO_SERIAL, parent.tokens, sampler=None, max_new_tokens=0, stop=frozenset(), inputs=parent.inputs,
            vocab=0, group=self,
        )  # fmt: skip
        child.prompt, child.past = parent.prompt, parent.past
        full = parent.past // self._block_size
        assert self._reserve is not None  # it runs
        self._reserve.share(parent.blocks[:full])
        child.blocks = parent.blocks[:full]
        if parent.past % self._block_size:
            child.blocks += self.take(1)
            copies.append((parent.blocks[full], child.blocks[full]))
        return child

    def _leave(self, request: Request) -> None:
        if self._reserve is not None:
            self._reserve.give(request.blocks)
        request.blocks = []
