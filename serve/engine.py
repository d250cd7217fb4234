"""The thread that owns the engine: requests join and leave between its steps, from any event loop.

Everything that touches the engine is a job in one queue, done in order between two steps. So a client that goes away
while its request is still on the way in is taken out again: its `close` is behind its `open`.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from runtime.engine import Engine
from runtime.request import Request
from runtime.sampling import Sampling
from serve.errors import RequestError
from specs.errors import SpecRTError

_AGAIN = "the server's log says more; it must be started again"


@dataclass(frozen=True)
class Job:
    """A sequence to generate."""

    prompt: Sequence[int]
    sampling: Sampling
    max_new_tokens: int
    stop: Collection[int]


@dataclass(frozen=True)
class News:
    """New ids of job `place`, and when the step that made them ended; without ids: it was accepted."""

    place: int
    ids: list[int]
    at: float
    finish: str | None = None
    error: Exception | None = None


class Running:
    """Jobs of one client in the engine; what becomes of them arrives in `news`, in its event loop."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.news: asyncio.Queue[News] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()
        self.requests: dict[int, Request] = {}  # those that run, by place: the engine thread's

    async def next(self) -> News:
        """The next news. Raises what went wrong: SpecRTError, of this client's jobs or SERVE-011 of all."""
        news = await self.news.get()
        if news.error is not None:
            raise news.error
        return news


@dataclass
class _Seat:
    """Whose a request is, and how many of its ids were told."""

    running: Running
    place: int
    told: int = 0


class EngineThread:
    """Steps an engine as long as somebody waits for it; others may step it too, as they may any engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failed = False  # a step raised: nothing can be served any more
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._whose: dict[Request, _Seat] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to wait for jobs."""
        self._thread.start()

    def stop(self) -> None:
        """End after the step that runs; what is left is cancelled."""
        self._jobs.put(None)
        self._thread.join()

    def open(self, jobs: Sequence[Job]) -> Running:
        """Submit jobs; the first news says whether they are accepted, all or none."""
        running = Running(jobs)
        self._jobs.put(lambda: self._submit(running))
        return running

    def close(self, running: Running) -> None:
        """Take out what has not ended; its blocks are free before the next step."""
        self._jobs.put(lambda: self._cancel(running))

    def drop(self, running: Running, place: int) -> None:
        """Take out one job, whose client has seen enough of it."""
        self._jobs.put(lambda: self._take_out(running, place))

    def give_up(self) -> None:
        """Tell all clients that nothing more comes: the time to finish is over."""
        self._jobs.put(lambda: self._fail("the server shuts down", "send the request again once it is back"))

    # -- in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._work():
                if self._whose:
                    self._step()
            return
        except Exception as error:  # noqa: BLE001 (whatever it is, each client must hear of it)
            traceback.print_exc(file=sys.stderr)
            self.failed = True
            self._fail(f"the engine stopped: {type(error).__name__}: {error}", _AGAIN)
        while self._work():  # refuse what still comes
            self._fail("the engine has stopped", _AGAIN)

    def _work(self) -> bool:
        """Do the jobs that are there, and wait for one where there is nothing else to do; whether to go on."""
        try:
            job = self._jobs.get(block=not self._whose)
            while job is not None:
                job()
                job = self._jobs.get_nowait()
        except Empty:
            return True
        for running in self._clients():
            self._cancel(running)
        return False

    def _submit(self, running: Running) -> None:
        try:
            for place, job in enumerate(running.jobs):
                request = self.engine.submit(
                    job.prompt, job.sampling, max_new_tokens=job.max_new_tokens, stop=job.stop
                )  # fmt: skip
                running.requests[place] = request
                self._whose[request] = _Seat(running, place)
        except SpecRTError as error:
            self._cancel(running)
            self._tell([(running, News(0, [], 0.0, error=error))])
            return
        self._tell([(running, News(0, [], 0.0))])

    def _cancel(self, running: Running) -> None:
        for place in list(running.requests):
            self._take_out(running, place)

    def _take_out(self, running: Running, place: int) -> None:
        if (request := running.requests.pop(place, None)) is not None:
            self.engine.cancel(request)
            del self._whose[request]

    def _step(self) -> None:
        self.engine.step()
        now, told = time.perf_counter(), []
        for request, seat in list(self._whose.items()):
            finish = request.finish  # read before the ids: where it is set, they are all there
            ids = request.new[seat.told :]
            if not ids and finish is None:
                continue
            seat.told += len(ids)
            told.append((seat.running, News(seat.place, ids, now, finish, request.error)))
            if finish is not None:
                del self._whose[request], seat.running.requests[seat.place]
        self._tell(told)

    def _fail(self, reason: str, hint: str) -> None:
        error = RequestError("SERVE-011", reason, hint=hint)
        clients = self._clients()
        self._tell([(running, News(0, [], 0.0, error=error)) for running in clients])
        for running in clients:
            self._cancel(running)

    def _clients(self) -> list[Running]:
        return list(dict.fromkeys(seat.running for seat in self._whose.values()))

    def _tell(self, told: Sequence[tuple[Running, News]]) -> None:
        """Hand news over, once for each event loop."""
        for loop in {running.loop for running, _ in told}:
            mine = [(running, news) for running, news in told if running.loop is loop]
            loop.call_soon_threadsafe(_put, mine)


def _put(told: Sequence[tuple[Running, News]]) -> None:
    for running, news in told:
        running.news.put_nowait(news)
