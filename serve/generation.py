"""From an understood request to pieces of text: jobs for the engine, and what comes back, choice by choice."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from runtime.checks import check_prompt
from runtime.model import Model
from serve.engine import EngineThread, Job, Running
from serve.metrics import Metrics
from serve.protocol import Asked
from serve.text import ChoiceText
from specs.errors import SpecRTError


@dataclass(frozen=True)
class Piece:
    """Text that a choice grows by; `finish` with its last: `stop` or `length`."""

    choice: int
    text: str
    finish: str | None


def jobs_of(model: Model, asked: Asked) -> list[Job]:
    """A job for each choice, those of one prompt beside each other; encodes texts, which may take a while.

    Raises SpecRTError RUN-001 to RUN-003, RUN-021, RUN-050 to RUN-052.
    """
    ends = frozenset(asked.stop_ids) | (frozenset() if asked.ignore_eos else frozenset(model.stop))
    for token in asked.stop_ids:
        if not 0 <= token < model.vocab:
            message = f"stop token {token} is out of range: ids go from 0 to {model.vocab - 1}"
            raise SpecRTError("RUN-021", message)
    jobs = []
    for prompt in asked.prompts:
        if asked.chat:
            ids = model.chat(prompt, **asked.variables)
        else:
            ids = model.encode(prompt) if isinstance(prompt, str) else prompt
        check_prompt(ids, model.limits.max_sequence, model.vocab)  # the engine does too, but texts come before it
        most = asked.max_tokens or max(1, model.limits.max_sequence - len(ids))
        jobs += [Job(ids, asked.how(choice), most, ends) for choice in range(asked.n)]
    return jobs


class Generation:
    """One client's choices on their way; `close` gives back what they hold, whether or not they have ended."""

    def __init__(self, model: Model, thread: EngineThread, metrics: Metrics, asked: Asked, jobs: list[Job]) -> None:
        self._thread, self._metrics, self._began = thread, metrics, time.perf_counter()
        self.choices = [ChoiceText(model.tokenizer, job.prompt, asked.stop, job.stop) for job in jobs]
        self.prompt_tokens = sum(len(job.prompt) for job in jobs[:: asked.n])
        self._last = [0.0] * len(jobs)  # when the last token of each came
        self._open = True
        self._running: Running = thread.open(jobs)

    async def accepted(self) -> None:
        """Wait until the engine has taken all. Raises SpecRTError RUN-001 to RUN-008 for what can't be run."""
        await self._running.next()
        self._metrics.prompt_tokens += self.prompt_tokens

    async def pieces(self) -> AsyncIterator[Piece]:
        """Text as it comes. Raises SpecRTError RUN-030, SERVE-011."""
        left = len(self.choices)
        while left:
            news = await self._running.next()
            choice = self.choices[news.place]
            if choice.finish is not None:  # it ended with a stop string, which the engine does not know
                continue
            text = choice.push(news.ids, news.finish)
            if news.ids:
                self._count(news.place, len(news.ids), news.at)
            if choice.finish is not None:
                left -= 1
                self._metrics.whole.add(news.at - self._began)
                if news.finish is None:
                    self._thread.drop(self._running, news.place)
            if text or choice.finish is not None:
                yield Piece(news.place, text, choice.finish)

    def close(self) -> bool:
        """Give back what the choices hold; whether this is the first time."""
        first, self._open = self._open, False
        if first:
            self._thread.close(self._running)
        return first

    @property
    def new_tokens(self) -> int:
        """Tokens so far, of all choices."""
        return sum(choice.tokens for choice in self.choices)

    def _count(self, place: int, count: int, at: float) -> None:
        self._metrics.new_tokens += count
        if self._last[place]:
            self._metrics.between.add(at - self._last[place])
        else:
            self._metrics.first.add(at - self._began)
        self._last[place] = at
