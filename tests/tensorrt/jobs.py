"""Work in processes of its own, where one case must not hide another: a time limit for each, and crashes survived.

A job is a tuple of cases. One that fails, dies or takes too long is split until the case is found; the process that it
ran in is not used again, since a broken CUDA context stays broken.
"""

from __future__ import annotations

import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

Job = tuple[int, ...]
Work = Callable[[Job], Any]
_SPAWN = get_context("spawn")  # a forked process has no CUDA
PARTS = 5  # of a job that failed: networks that are refused take as long to build as others, so not by halves
START = 120.0  # seconds that a new process has until it takes jobs


@dataclass(frozen=True)
class Outcome:
    """What a job gave, or why there is nothing; `started` is False where the time was up before."""

    job: Job
    result: Any = None
    reason: str | None = None
    started: bool = True


class _Worker:
    """A process that takes jobs one after the other until one fails."""

    def __init__(self, work: Work) -> None:
        self.pipe, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(work, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.started, self.end = False, 0.0

    def take(self, job: Job, seconds: float) -> None:
        self.job, self.end = job, time.monotonic() + (seconds if self.started else START)
        self.pipe.send(job)

    def outcome(self, seconds: float) -> Outcome | None:
        """What the finished job gave, None where the process has just started; call it when the pipe is ready."""
        assert self.job is not None
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join(10)
            answer = None, f"its process died with {self.process.exitcode}"
        if answer is None:
            self.started, self.end = True, time.monotonic() + seconds
            return None
        outcome, self.job = Outcome(self.job, *answer), None
        return outcome

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.pipe.close()


def _serve(work: Work, pipe: Connection) -> None:
    pipe.send(None)  # `work` is imported: the clock of the first job starts
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            answer = work(job), None
        except Exception as error:  # noqa: BLE001 (whatever it is, it is told)
            place = traceback.extract_tb(error.__traceback__)[-1]
            answer = None, f"{type(error).__name__}: {error} ({place.name}, line {place.lineno})"
        pipe.send(answer)
        if answer[1] is not None:
            return


def run_jobs(jobs: Sequence[Job], work: Work, *, workers: int, limit: float, seconds: float) -> Iterator[Outcome]:
    """The outcomes of all jobs as they come; `limit` seconds each, none is started after `seconds` in all."""
    queue, end = deque(jobs), time.monotonic() + seconds
    pool: list[_Worker] = []
    try:
        while True:
            if time.monotonic() >= end:
                yield from (Outcome(job, started=False) for job in queue)
                queue.clear()
            while queue and len(pool) < workers and all(worker.job for worker in pool):
                pool.append(_Worker(work))
                pool[-1].take(queue.popleft(), limit)
            for worker in pool:
                if queue and worker.job is None:
                    worker.take(queue.popleft(), limit)
            busy = {worker.pipe: worker for worker in pool if worker.job is not None}
            if not busy:
                return
            soonest = min(worker.end for worker in busy.values())
            until = min(soonest, end) if queue else soonest
            for pipe in wait(list(busy), max(until - time.monotonic(), 0.0)):
                outcome = busy[pipe].outcome(limit)
                if outcome is not None:
                    yield from _settled(busy[pipe], outcome, pool, queue)
            for worker in busy.values():
                if worker.job is not None and time.monotonic() >= worker.end:
                    late = Outcome(worker.job, reason=f"not done after {limit:g} seconds")
                    yield from _settled(worker, late, pool, queue)
    finally:
        for worker in pool:
            worker.kill()


def _settled(worker: _Worker, outcome: Outcome, pool: list[_Worker], queue: deque[Job]) -> Iterator[Outcome]:
    """The outcome; one that failed ends its process, and if it has more than one case, is queued again in parts."""
    if outcome.reason is None:
        yield outcome
        return
    pool.remove(worker)
    worker.kill()
    count, size = len(outcome.job), max(len(outcome.job) // PARTS, 1)
    if count > 1:
        queue.extendleft(reversed([outcome.job[start : start + size] for start in range(0, count, size)]))
    else:
        yield outcome
