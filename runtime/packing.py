"""Writes the packed inputs of a step into buffers that live as long as the engine.

A decode step of the same sequences as before only adds one to a few numbers in place: the arrays stay the same objects,
so the executable keeps them bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np

from runtime.executable import PACKED, Array, Ints
from runtime.request import Request

Work = Sequence[tuple[Request, int]]  # sequences and how many tokens of each a step takes, at least 1


class Packer:
    """Arrays for steps of at most `max_batch` sequences; `extra` are per-sequence inputs beside the usual ones."""

    def __init__(self, max_batch: int, max_tokens: int, max_blocks: int, extra: Iterable[str] = ()) -> None:
        sizes = {
            "tokens": max_tokens, "positions": max_tokens, "rows": max_tokens, "lengths": max_tokens,
            "select": max_tokens, "past_lens": max_batch, "seq_begins": max_batch + 1, "block_begins": max_batch + 1,
            "block_ids": max_blocks,
            **dict.fromkeys(extra, max_batch),
        }  # fmt: skip
        self._extra = tuple(extra)
        self._buffers = {name: np.zeros(size, np.int32) for name, size in sizes.items()}
        self._views: dict[tuple[str, int], Ints] = {}
        self._batch: dict[str, Array] = {"max_context": np.zeros((), np.int32)}
        self._order = (*PACKED, *self._extra)
        self._last: list[Request] = []  # the sequences of a decode step
        self._counts: list[int] = []  # and how many blocks each had

    def pack(self, work: Work) -> dict[str, Array]:
        """The inputs of a step, as in runtime.executable.PACKED; valid until the next call."""
        if self._same_decode(work):
            self._go_on(work)
            return self._batch
        self._pack(work)
        prompts = any(request.past + 1 != len(request.tokens) for request, _ in work)
        self._last = [] if prompts else [request for request, _ in work]
        return self._batch

    def _go_on(self, work: Work) -> None:
        """A step of the same sequences, one token further."""
        batch, last = self._batch, self._last
        self._last = []  # an interrupt leaves nothing to go on from
        batch["tokens"][:] = [request.tokens[-1] for request, _ in work]
        batch["positions"] += 1
        batch["lengths"] += 1
        batch["past_lens"] += 1
        batch["max_context"] += 1
        counts = [len(request.blocks) for request in last]
        if counts != self._counts:
            self._put_new_blocks(last, counts)
        self._last = last

    def _same_decode(self, work: Work) -> bool:
        """Whether the step before took a token of each of the same sequences, and this takes the next."""
        if len(self._last) != len(work):
            return False
        before = zip(work, self._last, self._batch["past_lens"].tolist())  # noqa: B905 - lengths are equal, and this is hot
        return all(
            request is same and count == 1 and request.past == past + 1 for (request, count), same, past in before
        )

    def _pack(self, work: Work) -> None:
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []  # the sequence of each token
        lengths: list[int] = []
        select: list[int] = []
        for row, (request, count) in enumerate(work):
            end = request.past + count
            rows += [row] * count
            tokens += request.tokens[request.past : end]
            positions += range(request.past, end)
            # The sequence's length when its token first ran: a prompt counts whole, also where it is cut into pieces.
            lengths += (max(request.prompt, place + 1) for place in range(request.past, end))
            if request.whole:
                select += range(len(tokens) - count, len(tokens))
            elif end == len(request.tokens):
                select.append(len(tokens) - 1)
        self._put("tokens", tokens)
        self._put("positions", positions)
        self._put("rows", rows)
        self._put("lengths", lengths)
        self._put("select", select or [0])  # an engine gives at least one row; nobody reads it then
        self._put("past_lens", [request.past for request, _ in work])
        self._put("seq_begins", list(accumulate((count for _, count in work), initial=0)))
        self._batch["max_context"][...] = max(request.past + count for request, count in work)
        for name in self._extra:
            self._put(name, [request.inputs[name] for request, _ in work])
        self._put("block_ids", [block for request, _ in work for block in request.blocks])
        self._put_counts([len(request.blocks) for request, _ in work])

    def _put_new_blocks(self, last: list[Request], counts: list[int]) -> None:
        """The blocks that sequences took since the step before, behind those that each had: the others stay."""
        places: list[int] = []
        blocks: list[int] = []
        ends = self._batch["block_begins"][1:].tolist()
        for request, end, before, count in zip(last, ends, self._counts, counts, strict=True):
            places += [end] * (count - before)
            blocks += request.blocks[before:]
        self._put("block_ids", np.insert(self._batch["block_ids"], places, blocks))
        self._put_counts(counts)

    def _put_counts(self, counts: list[int]) -> None:
        self._counts = counts
        self._put("block_begins", list(accumulate(counts, initial=0)))

    def _put(self, name: str, values: list[int] | Array) -> None:
        size = len(values)
        view = self._views.get((name, size))
        if view is None:
            view = self._buffers[name][:size]
            if size <= 4 * len(self._buffers["past_lens"]):  # the sizes that come again, in decode steps
                self._views[name, size] = view
        view[:] = values
        self._batch[name] = view
