"""In-flight batching: sequences join, run and leave while others run; prefill and decode share each step.

Order is by arrival. A sequence is admitted when the blocks of all its tokens are free, and one more for each running
sequence; it takes further blocks as it grows. Where none is left, the youngest running sequence gives up its blocks and
is computed again later, from its tokens: the oldest always gets on, and nobody's result depends on it. A request that
the whole cache could not hold is refused.

Where the executable can, a step is started before the tokens of the one before are read: the host prepares it while the
device computes, and the device hands the tokens on by itself. For that time the engine takes for granted that every
sequence goes on: what ends by a stop token has then computed one token too many, which is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from threading import RLock
from typing import NamedTuple

import numpy as np

from runtime.cache import BlockAllocator
from runtime.checks import check_inputs, check_prompt
from runtime.derive import Rules
from runtime.executable import LIKELIEST, PACKED, Ahead, Executable, Floats, Ints, Picks
from runtime.packing import Packer
from runtime.request import Request
from runtime.sampling import Sampler, Sampling, how_words
from specs.errors import SpecRTError

STEP_TOKENS = 512  # in one call: long enough to use the machine fully, short enough for those that wait to decode


class _Started(NamedTuple):
    """A step whose results nobody has taken: `rows` of logits or tokens for each of `work`, or a ticket to wait for."""

    work: list[tuple[Request, int]]
    rows: list[int]
    results: Floats | list[int] | None = None
    ticket: int = 0


class Engine:
    """Runs requests on an executable, `step` by `step`; safe to call from several threads."""

    def __init__(
        self,
        executable: Executable,
        *,
        max_batch: int,
        max_sequence: int,
        vocab: int,
        inputs: Sequence[str] = PACKED,
        derive: Rules | None = None,
        step_tokens: int | None = None,
    ) -> None:
        if step_tokens is not None and step_tokens < max_batch:
            message = f"`step_tokens` is {step_tokens}, expected at least one for each of {max_batch} sequences"
            raise SpecRTError("RUN-013", message)
        self.max_batch, self.max_sequence, self.vocab = max_batch, max_sequence, vocab
        self.step_tokens = step_tokens or max(STEP_TOKENS, max_batch)
        self.derive = derive or {}
        self.extra_inputs = tuple(name for name in inputs if name not in PACKED)
        self.preemptions = 0
        self._executable = executable
        self._picks = executable if isinstance(executable, Picks) else None
        self._ahead = executable if isinstance(executable, Ahead) else None
        self._next: _Started | None = None  # a step behind the last one that was read
        self._assumed: list[tuple[Request, int, int]] = []  # sequences, and how many tokens they had before and in all
        self._allocator = BlockAllocator(executable.blocks)
        # a prompt with inputs of its own is never cut (see _prefill): room for one more prompt in a step
        room = self.step_tokens + (max_sequence if self.extra_inputs else 0)
        self._packer = Packer(max_batch, room, executable.blocks, self.extra_inputs)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []  # by arrival
        self._serial = 0
        self._lock = RLock()

    # -- what a caller uses ---------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = 128,
        stop: Collection[int] = (),
        inputs: Mapping[str, int] | None = None,
    ) -> Request:
        """Queue a prompt, to generate from. Raises SpecRTError RUN-001 to RUN-008, RUN-017 for what can't be run."""
        inputs = self._check(prompt, inputs or {})
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
            raise SpecRTError("RUN-005", f"`max_new_tokens` is {max_new_tokens!r}, expected a whole number from 1 up")
        total = len(prompt) + max_new_tokens
        if total > self.max_sequence:
            left = self.max_sequence - len(prompt)
            message = (
                f"{len(prompt)} tokens of prompt and {max_new_tokens} new ones exceed the limit of {self.max_sequence}"
            )
            lower = f"lower `max_new_tokens` to {left}" if left else "shorten the prompt"
            raise SpecRTError("RUN-006", message, hint=f"{lower}, or compile with a higher `max_sequence`")
        sampler = Sampler(sampling or Sampling(), prompt, self.vocab)
        return self._submit(prompt, sampler, max_new_tokens, frozenset(stop), inputs, total - 1)

    def submit_logits(self, prompt: Sequence[int], *, inputs: Mapping[str, int] | None = None) -> Request:
        """Queue a prompt, for the logits of all its tokens. Raises SpecRTError RUN-001 to RUN-008, RUN-017."""
        inputs = self._check(prompt, inputs or {})
        return self._submit(prompt, None, 0, frozenset(), inputs, len(prompt))

    def step(self) -> list[Request]:
        """Finish one run of the executable; gives the requests that got a token or ended; none where nothing waits."""
        with self._lock:
            # Until it is taken in full a step is not kept: one that an error or an interrupt cuts off is forgotten, and
            # its sequences, which stand where they stood, compute the same again.
            self._revert()
            started, self._next = self._next, None
            if started is None or all(request.finish is not None for request, _ in started.work):
                work = self._schedule()
                if not work:
                    return []
                started = self._start(work)
            following = self._follow(started) if started.results is None else None
            moved = self._take(started)
            self._next = following
            return moved

    def cancel(self, request: Request) -> None:
        """Take a request out, wherever it is; one that has ended stays as it is."""
        with self._lock:
            if request.finish is not None:
                return
            request.finish = "cancelled"
            if request in self._running:
                self._leave(request)
            else:
                self._waiting.remove(request)

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._running or self._waiting)

    @property
    def free_blocks(self) -> int:
        """Cache blocks that nobody has."""
        return self._allocator.free

    # -- one step -------------------------------------------------------------------------------------------------

    def _start(self, work: list[tuple[Request, int]]) -> _Started:
        """Run a step, or start it where its tokens can be waited for."""
        batch, rows = self._packer.pack(work), _rows(work)
        if self._picks is None or not _plain(work):
            return _Started(work, rows, self._executable.execute(batch)["logits"])
        how = _how(work, rows)
        if self._ahead is None:
            return _Started(work, rows, self._picks.pick(batch, how).tolist())
        return _Started(work, rows, ticket=self._ahead.launch(batch, how=how))

    def _follow(self, started: _Started) -> _Started | None:
        """Start the step behind one whose tokens nobody has read, as if all its sequences went on.

        None where somebody's logits must be read, or somebody would lose blocks, whose tokens must be known for that.
        """
        assert self._ahead is not None  # it gave the ticket
        try:
            chosen = self._assume(started)
            work = self._schedule(preempt=False)
            if not work or not _plain(work):
                return None
            rows = _rows(work)
            # of those that take one token; they come first, and a piece of a prompt among them has no source
            sources = [chosen.get(request.serial, -1) for request, count in work if count == 1]
            ticket = self._ahead.launch(self._packer.pack(work), sources, _how(work, rows))
            return _Started(work, rows, ticket=ticket)
        finally:
            self._revert()

    def _assume(self, started: _Started) -> dict[int, int]:
        """Put sequences where a step will leave them, a token in place of each that is on its way; gives their rows.

        One that will be at its last token gets none, and so has nothing to compute; what has ended is in no schedule.
        """
        chosen: dict[int, int] = {}
        row = 0
        for (request, count), rows in zip(started.work, started.rows):  # noqa: B905 - lengths are equal, and this is hot
            self._assumed.append((request, request.past, len(request.tokens)))
            request.past += count
            if rows and len(request.new) + 1 < request.max_new_tokens:
                request.tokens.append(0)
                chosen[request.serial] = row
            row += rows
        return chosen

    def _revert(self) -> None:
        """Put sequences back where they stand, also where an interrupt kept that from being done."""
        for request, past, length in self._assumed:
            request.past = past
            del request.tokens[length:]
        self._assumed.clear()

    def _take(self, started: _Started) -> list[Request]:
        """Give each sequence its results."""
        found = started.results
        if found is None:
            assert self._ahead is not None  # it gave the ticket
            found = self._ahead.wait(started.ticket).tolist()
        moved: list[Request] = []
        row = 0
        for (request, count), rows in zip(started.work, started.rows):  # noqa: B905 - lengths are equal, and this is hot
            # one that ended after this step was started has a token too many
            if request.finish is None and request.take(found[row : row + rows], count):
                moved.append(request)
                if request.finish is not None:
                    self._leave(request)
            row += rows
        return moved

    # -- admission and scheduling ---------------------------------------------------------------------------------

    def _check(self, prompt: Sequence[int], inputs: Mapping[str, int]) -> dict[str, int]:
        """All inputs of a sequence: what is not given follows from its tokens."""
        check_prompt(prompt, self.max_sequence, self.vocab)
        check_inputs(inputs, self.extra_inputs, self.derive)
        missing = [name for name in self.extra_inputs if name not in inputs]
        return {**inputs, **{name: self.derive[name].apply(name, prompt) for name in missing}}

    def _submit(
        self,
        prompt: Sequence[int],
        sampler: Sampler | None,
        new: int,
        stop: frozenset[int],
        inputs: Mapping[str, int],
        most: int,
    ) -> Request:
        size, blocks = self._executable.block_size, self._allocator.total
        if self._blocks_for(most) > blocks:
            message = f"the sequence may grow to {most} tokens, the KV cache holds {blocks * size}"
            raise SpecRTError(
                "RUN-007", message, hint=f"load with `cache_tokens` of {most} or more, or lower `max_new_tokens`"
            )
        with self._lock:
            self._serial += 1
            request = Request(
                self._serial, prompt, sampler=sampler, max_new_tokens=new, stop=stop, inputs=inputs, vocab=self.vocab
            )
            self._waiting.append(request)
        return request

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._executable.block_size)

    def _schedule(self, *, preempt: bool = True) -> list[tuple[Request, int]]:
        """Who runs in this step and how many tokens of each: those that need one first, then prompts.

        Nobody does where somebody would have to be preempted and must not be.
        """
        size = self._executable.block_size
        growing = [request for request in self._running if len(request.tokens) > len(request.blocks) * size]
        if not preempt and len(growing) > self._allocator.free:
            return []
        for request in growing:
            if request.blocks:  # else it was just preempted
                self._grow(request)
        if self._waiting:
            self._admit()
        work = [(request, 1) for request in self._running if len(request.tokens) == request.past + 1]
        if len(work) < len(self._running):
            self._prefill(work)
        return work

    def _prefill(self, work: list[tuple[Request, int]]) -> None:
        """Add pieces of prompts to a step, oldest first, up to `step_tokens` in all."""
        left = self.step_tokens - len(work)
        first = True
        for request in self._running:
            need = len(request.tokens) - request.past
            if need <= 1:  # decodes, or will be at its last token
                continue
            # inputs of a sequence's own may let its tokens see later ones, which must then be in the same step
            count = need if request.inputs else min(need, left)
            if left <= 0 or (count > left and not first):
                return
            work.append((request, count))
            left -= count
            first = False

    def _grow(self, request: Request) -> None:
        """One more block for a running sequence, taken from the youngest where none is free."""
        while (blocks := self._allocator.take(1)) is None:
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is request:
                return
        request.blocks += blocks

    def _preempt(self, request: Request) -> None:
        self.preemptions += 1
        self._leave(request)
        request.past = 0
        self._waiting.appendleft(request)

    def _leave(self, request: Request) -> None:
        self._running.remove(request)
        # A step on its way may still write to these blocks: whoever gets them writes, and reads, in a later one, and
        # steps run in the order in which they were started.
        self._allocator.give(request.blocks)
        request.blocks = []

    def _fits(self) -> bool:
        """Whether somebody waits and can start now."""
        if not self._waiting or len(self._running) >= self.max_batch:
            return False
        # a block for each that runs, to grow into; where one block holds the longest sequence, none grows
        spare = len(self._running) if self._blocks_for(self.max_sequence) > 1 else 0
        return self._blocks_for(len(self._waiting[0].tokens)) + spare <= self._allocator.free

    def _admit(self) -> None:
        while self._fits():
            request = self._waiting.popleft()
            blocks = self._allocator.take(self._blocks_for(len(request.tokens)))
            assert blocks is not None  # it fits
            request.blocks = blocks
            self._running.append(request)


def _plain(work: Sequence[tuple[Request, int]]) -> bool:
    """Whether nobody's logits are wanted, but tokens that depend on them alone."""
    return all(request.plain for request, _ in work)


def _how(work: Sequence[tuple[Request, int]], rows: Sequence[int]) -> Ints:
    """How the token of each selected row is chosen, see runtime.executable.Picks."""
    if not any(request.draws for request, _ in work):
        return LIKELIEST
    return how_words(
        [
            request.sampler.how(len(request.tokens) - request.prompt)
            for (request, _), count in zip(work, rows, strict=True)
            if count and request.sampler is not None
        ]
    )


def _rows(work: Sequence[tuple[Request, int]]) -> list[int]:
    """Selected rows of each: of all its tokens where logits are wanted, else of its last token, if the step has it."""
    return [
        count if request.sampler is None else int(request.past + count == len(request.tokens))
        for request, count in work
    ]
