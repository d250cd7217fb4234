"""Who is in the next step, and which blocks of the cache are whose.

Order is by arrival. A sequence is admitted when the blocks of all its tokens are free, and one more for each running
sequence; it takes further blocks as it grows. Where none is left, the youngest running sequence gives up its blocks and
is computed again later, from its tokens: the oldest always gets on, and nobody's result depends on it. A request that
the whole cache could not hold is refused. A prompt with several beams is admitted when all blocks that its beams can
come to hold are free, and gives none up (runtime/beam_request.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from runtime.beam_request import BeamRequest
from runtime.cache import BlockAllocator
from runtime.request import Request

_NOBODY: Mapping[int, int] = {}


class Scheduler:
    """Sequences that wait and that run, and the blocks of those that do."""

    def __init__(self, blocks: int, block_size: int, max_batch: int, max_sequence: int, step_tokens: int) -> None:
        """Over a cache of `blocks`; `step_tokens` is the most in one step."""
        self._block_size, self._max_batch, self._max_sequence = block_size, max_batch, max_sequence
        self._step_tokens = step_tokens
        self.preemptions = 0
        self.allocator = BlockAllocator(blocks)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # by arrival

    @property
    def busy(self) -> bool:
        """Whether somebody runs or waits."""
        return bool(self.running or self.waiting)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self._block_size)

    def next(
        self, preempt: bool = True, groups: int = 1, held: Mapping[int, int] = _NOBODY
    ) -> list[tuple[Request, int]]:
        """Who runs in this step and how many tokens of each: those that need one first, then prompts.

        Nobody does where somebody would have to be preempted and must not be. Those that need one are dealt out evenly
        to `groups` steps; `held` are in one that is on its way, by serial.
        """
        size = self._block_size
        growing = [request for request in self.running if len(request.tokens) > len(request.blocks) * size]
        if not preempt and len(growing) > self.allocator.free:
            return []
        for request in growing:
            if request.blocks:  # else it was just preempted
                self._grow(request)
        if self.waiting:
            self._admit()
        work = [(request, 1) for request in self.running if len(request.tokens) == request.past + 1]
        if groups > 1 or held:
            most, free = -(-len(work) // groups), max(1, groups - len(set(held.values())))
            work = [one for one in work if one[0].serial not in held]
            work = work[: min(most, -(-len(work) // free))]
        if len(work) < len(self.running):
            self._prefill(work)
        return work

    def _prefill(self, work: list[tuple[Request, int]]) -> None:
        """Add pieces of prompts to a step, oldest first, up to `step_tokens` in all."""
        left = self._step_tokens - len(work)
        first = True
        for request in self.running:
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
        if request.group is not None:
            request.blocks += request.group.take(1)
            return
        while (blocks := self.allocator.take(1)) is None:
            youngest = next(one for one in reversed(self.running) if one.group is None)
            self._preempt(youngest)
            if youngest is request:
                return
        request.blocks += blocks

    def _preempt(self, request: Request) -> None:
        self.preemptions += 1
        self.leave(request)
        request.past = 0
        self.waiting.appendleft(request)

    def drop(self, request: Request) -> None:
        """Take a sequence out, wherever it is."""
        if request in self.running:
            self.leave(request)
        else:
            self.waiting.remove(request)

    def close(self, group: BeamRequest) -> None:
        """Take a prompt with beams out, wherever its sequences are."""
        group.close()
        self.running = [request for request in self.running if request.group is not group]
        self.waiting = deque(request for request in self.waiting if request.group is not group)

    def replace(self, before: Sequence[Request], after: Sequence[Request]) -> None:
        """Put other sequences in place of some that run, neighbours."""
        at = self.running.index(before[0])
        self.running[at : at + len(before)] = after

    def leave(self, request: Request) -> None:
        """A running sequence gives back its blocks and its place."""
        self.running.remove(request)
        # A step on its way may still write to these blocks: whoever gets them writes, and reads, in a later one, and
        # steps run in the order in which they were started.
        self.allocator.give(request.blocks)
        request.blocks = []

    def _fits(self) -> bool:
        """Whether somebody waits and can start now."""
        if not self.waiting:
            return False
        first = self.waiting[0]
        if first.width + sum(request.width for request in self.running) > self._max_batch:
            return False
        # a block for each that runs, to grow into; where one block holds the longest sequence, none grows
        grows = self.blocks_for(self._max_sequence) > 1
        spare = sum(request.group is None for request in self.running) if grows else 0
        needed = self.blocks_for(len(first.tokens)) if first.group is None else first.group.most_blocks
        return needed + spare <= self.allocator.free

    def _admit(self) -> None:
        while self._fits():
            request = self.waiting.popleft()
            count = self.blocks_for(len(request.tokens))
            if request.group is not None:
                request.group.admit(self.allocator)
                blocks: list[int] | None = request.group.take(count)
            else:
                blocks = self.allocator.take(count)
            assert blocks is not None  # it fits
            request.blocks = blocks
            self.running.append(request)
