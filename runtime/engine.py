"""In-flight batching: sequences join, run and leave while others run; prefill and decode share each step.

Who is in a step, and which cache blocks are whose, is in runtime/schedule.py.

Where the executable can, a step is started before the tokens of the one before are read: the host prepares it while the
device computes, and the device hands the tokens on by itself. For that time the engine takes for granted that every
sequence goes on: what ends by a stop token has then computed one token too many, which is dropped.

A pipeline of several stages works on as many steps at a time. Sequences that decode are dealt out to them, so that the
token of each is known when its next step reaches the first stage; pieces of a prompt need not wait for each other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from threading import RLock
from typing import NamedTuple

import numpy as np

from runtime.beam_request import BeamRequest
from runtime.beam_search import Beams, BeamSearch
from runtime.checks import check_inputs, check_prompt
from runtime.derive import Rules
from runtime.executable import LIKELIEST, PACKED, Ahead, Executable, Floats, Ints, Picks
from runtime.packing import Packer
from runtime.request import Request
from runtime.sampling import Sampler, Sampling, how_words
from runtime.schedule import Scheduler
from specs.errors import SpecRTError

STEP_TOKENS = 512  # in one call: long enough to use the machine fully, short enough for those that wait to decode

_KNOWN = (0, -1)  # the row of a token that the host has


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
        self._executable = executable
        self._picks = executable if isinstance(executable, Picks) else None
        self._ahead = executable if isinstance(executable, Ahead) else None
        self._stages = 1 if self._ahead is None else self._ahead.stages
        self._flight: list[_Started] = []  # steps behind the last one that was read
        self._assumed: list[tuple[Request, int, int]] = []  # sequences, and how many tokens they had before and in all
        size = executable.block_size
        self._schedule = Scheduler(executable.blocks, size, max_batch, max_sequence, self.step_tokens)
        # a prompt with inputs of its own is never cut (runtime/schedule.py): room for one more prompt in a step
        room = self.step_tokens + (max_sequence if self.extra_inputs else 0)
        most = max_batch * self._schedule.blocks_for(max_sequence)  # more than there are, where sequences share some
        self._packer = Packer(max_batch, room, most, self.extra_inputs)
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
        total = self._check_length(len(prompt), max_new_tokens)
        sampler = Sampler(sampling or Sampling(), prompt, self.vocab)
        return self._submit(prompt, sampler, max_new_tokens, frozenset(stop), inputs, total - 1)

    def submit_beams(
        self,
        prompt: Sequence[int],
        beams: Beams,
        *,
        repetition_penalty: float | None = None,
        max_new_tokens: int = 128,
        stop: Collection[int] = (),
        inputs: Mapping[str, int] | None = None,
    ) -> BeamRequest:
        """Queue a prompt, to search what goes on from it. Raises SpecRTError as `submit`, RUN-020, RUN-022."""
        inputs = self._check(prompt, inputs or {})
        self._check_length(len(prompt), max_new_tokens)
        if beams.num_beams > self.max_batch:
            message = f"`num_beams` is {beams.num_beams}, the model serves {self.max_batch} sequences at once"
            raise SpecRTError("RUN-022", message, hint="lower it, or compile with a higher `max_batch`")
        search = BeamSearch(
            beams, prompt, max_new_tokens=max_new_tokens, stop=stop, repetition_penalty=repetition_penalty
        )
        group = BeamRequest(prompt, search, inputs, block_size=self._executable.block_size, most=max_new_tokens)
        if group.most_blocks > self._schedule.allocator.total:
            size = self._executable.block_size
            message = (
                f"{beams.num_beams} beams of up to {len(prompt) + max_new_tokens - 1} tokens may fill "
                f"{group.most_blocks * size} tokens of the KV cache, it holds {self._schedule.allocator.total * size}"
            )
            hint = f"load with `cache_tokens` of {group.most_blocks * size} or more, or lower `num_beams`"
            raise SpecRTError("RUN-007", message, hint=hint)
        with self._lock:
            self._schedule.waiting.append(group.first)
        return group

    def submit_logits(self, prompt: Sequence[int], *, inputs: Mapping[str, int] | None = None) -> Request:
        """Queue a prompt, for the logits of all its tokens. Raises SpecRTError RUN-001 to RUN-008, RUN-017."""
        inputs = self._check(prompt, inputs or {})
        return self._submit(prompt, None, 0, frozenset(), inputs, len(prompt))

    def step(self) -> list[Request | BeamRequest]:
        """Finish one run of the executable; gives the requests that got a token or ended; none where nothing waits."""
        with self._lock:
            # Until it is taken in full a step is not kept: one that an error or an interrupt cuts off is forgotten, and
            # its sequences, which stand where they stood, compute the same again.
            self._revert()
            flight, self._flight = self._flight, []
            while flight and all(request.finish is not None for request, _ in flight[0].work):
                flight.pop(0)
            if not flight:
                work = self._schedule.next(groups=self._groups())
                if not work:
                    return []
                flight.append(self._start(work))
            while len(flight) <= self._stages and (following := self._follow(flight)) is not None:
                flight.append(following)
            moved = self._take(flight.pop(0))
            self._flight = flight
            return moved

    def cancel(self, request: Request | BeamRequest) -> None:
        """Take a request out, wherever it is; one that has ended stays as it is."""
        with self._lock:
            if request.finish is not None:
                return
            request.finish = "cancelled"
            if isinstance(request, BeamRequest):
                self._schedule.close(request)
            else:
                self._schedule.drop(request)

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return self._schedule.busy

    @property
    def preemptions(self) -> int:
        """How often a sequence gave its blocks up."""
        return self._schedule.preemptions

    @property
    def free_blocks(self) -> int:
        """Cache blocks that nobody has."""
        return self._schedule.allocator.free

    @property
    def blocks(self) -> int:
        """Cache blocks in all."""
        return self._schedule.allocator.total

    @property
    def running(self) -> int:
        """Sequences that have blocks and take part in steps."""
        return len(self._schedule.running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for a place."""
        return len(self._schedule.waiting)

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

    def _groups(self) -> int:
        """How many steps those that decode are dealt out to; who wants logits waits for them, and all with it."""
        return self._stages if all(request.plain for request in self._schedule.running) else 1

    def _follow(self, flight: Sequence[_Started]) -> _Started | None:
        """Start the step behind those whose tokens nobody has read, as if all their sequences went on.

        None where somebody's logits must be read, or somebody would lose blocks, whose tokens must be known for that.
        """
        if self._ahead is None or flight[0].results is not None:
            return None
        try:
            chosen = self._assume(flight)
            at = len(flight) - self._stages  # this step of the flight has left the pipeline when the new one enters it
            work = self._schedule.next(False, self._groups(), _behind(at, chosen))
            if not work and chosen:  # there are fewer groups than stages: the one that waits longest goes on
                at = min(step for step, _ in chosen.values())
                work = self._schedule.next(False, self._groups(), _behind(at, chosen))
            if not work or not _plain(work):
                return None
            rows = _rows(work)
            # of those that take one token; they come first, and a piece of a prompt among them has no source
            sources = [chosen.get(request.serial, _KNOWN)[1] for request, count in work if count == 1]
            ticket = self._ahead.launch(self._packer.pack(work), sources, _how(work, rows), len(flight) - max(at, 0))
            return _Started(work, rows, ticket=ticket)
        finally:
            self._revert()

    def _assume(self, flight: Sequence[_Started]) -> dict[int, tuple[int, int]]:
        """Put sequences where steps will leave them, a token in place of each that is on its way.

        Gives the step and the row of each sequence's last such token, by serial. One that will be at its last token
        gets none, and so has nothing to compute; what has ended is in no schedule.
        """
        chosen: dict[int, tuple[int, int]] = {}
        for number, started in enumerate(flight):
            row = 0
            for (request, count), rows in zip(started.work, started.rows):  # noqa: B905 - lengths are equal, and this is hot
                self._assumed.append((request, request.past, len(request.tokens)))
                request.past += count
                if rows and len(request.tokens) - request.prompt + 1 < request.max_new_tokens:
                    request.tokens.append(0)
                    chosen[request.serial] = number, row
                row += rows
        return chosen

    def _revert(self) -> None:
        """Put sequences back where they stand, also where an interrupt kept that from being done."""
        for request, past, length in reversed(self._assumed):
            request.past = past
            del request.tokens[length:]
        self._assumed.clear()

    def _take(self, started: _Started) -> list[Request | BeamRequest]:
        """Give each sequence its results."""
        found = started.results
        if found is None:
            assert self._ahead is not None  # it gave the ticket
            found = self._ahead.wait(started.ticket).tolist()
        moved: list[Request | BeamRequest] = []
        searches: dict[BeamRequest, dict[Request, Floats]] = {}
        row = 0
        for (request, count), rows in zip(started.work, started.rows):  # noqa: B905 - lengths are equal, and this is hot
            if request.group is not None and rows:  # its beams move together, once all have their logits
                assert not isinstance(found, list)  # nobody else's tokens were chosen for it
                searches.setdefault(request.group, {})[request] = found[row]
            # one that ended after this step was started has a token too many
            elif request.finish is None and request.take(found[row : row + rows], count):
                moved.append(request)
                if request.finish is not None:
                    self._schedule.leave(request)
            row += rows
        moved += [group for group, each in searches.items() if self._search(group, each)]
        return moved

    def _search(self, group: BeamRequest, logits: Mapping[Request, Floats]) -> bool:
        """Put the beams of a prompt where they go on; whether it ended."""
        before = list(group.seats)
        copies = group.advance(logits)
        if group.finish is not None:
            self._schedule.close(group)
            return True
        self._schedule.replace(before, group.seats)
        if copies:
            self._executable.copy_blocks(copies)
        return False

    # -- what can be run ----------------------------------------------------------------------------------------

    def _check(self, prompt: Sequence[int], inputs: Mapping[str, int]) -> dict[str, int]:
        """All inputs of a sequence: what is not given follows from its tokens."""
        check_prompt(prompt, self.max_sequence, self.vocab)
        check_inputs(inputs, self.extra_inputs, self.derive)
        missing = [name for name in self.extra_inputs if name not in inputs]
        return {**inputs, **{name: self.derive[name].apply(name, prompt) for name in missing}}

    def _check_length(self, prompt: int, new: int) -> int:
        """The tokens of a sequence in all."""
        if isinstance(new, bool) or not isinstance(new, (int, np.integer)) or new < 1:
            raise SpecRTError("RUN-005", f"`max_new_tokens` is {new!r}, expected a whole number from 1 up")
        total = prompt + int(new)
        if total > self.max_sequence:
            left = self.max_sequence - prompt
            message = f"{prompt} tokens of prompt and {new} new ones exceed the limit of {self.max_sequence}"
            lower = f"lower `max_new_tokens` to {left}" if left else "shorten the prompt"
            raise SpecRTError("RUN-006", message, hint=f"{lower}, or compile with a higher `max_sequence`")
        return total

    def _submit(
        self,
        prompt: Sequence[int],
        sampler: Sampler | None,
        new: int,
        stop: frozenset[int],
        inputs: Mapping[str, int],
        most: int,
    ) -> Request:
        size, blocks = self._executable.block_size, self._schedule.allocator.total
        if self._schedule.blocks_for(most) > blocks:
            message = f"the sequence may grow to {most} tokens, the KV cache holds {blocks * size}"
            raise SpecRTError(
                "RUN-007", message, hint=f"load with `cache_tokens` of {most} or more, or lower `max_new_tokens`"
            )
        with self._lock:
            self._serial += 1
            request = Request(
                self._serial, prompt, sampler=sampler, max_new_tokens=new, stop=stop, inputs=inputs, vocab=self.vocab
            )
            self._schedule.waiting.append(request)
        return request


def _behind(at: int, chosen: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """Whose tokens come from steps behind that one, and from which, by serial."""
    return {serial: step for serial, (step, _) in chosen.items() if step > at}


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
    return [count if request.whole else int(request.past + count == len(request.tokens)) for request, count in work]
