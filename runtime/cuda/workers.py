"""The processes of the ranks beside this one: started, told what to do, watched, and ended with it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from runtime.cuda.missing import rank_ended
from runtime.cuda.worker import CLOSE, Failed
from specs.errors import SpecRTError

PATIENCE = 20.0  # seconds for a rank to give back what it holds


class Process(Protocol):
    """What is asked of a rank's process; subprocess.Popen has it."""

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended. Raises subprocess.TimeoutExpired."""

    def kill(self) -> None:
        """End it at once."""


def start(function: Callable[..., None], *arguments: Any) -> tuple[Connection, Process]:
    """A process that calls `function(connection, *arguments)`, and this end of the connection."""
    mine, theirs = Pipe()
    command = [sys.executable, "-m", "runtime.cuda.worker", str(theirs.fileno())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    mine.send((function, arguments))
    return mine, process


class Workers:
    """The ranks from 1 on. A thread sees what they report: the first that fails ends them all.

    `failure` is what went wrong, `closed` whether they were told to end; `on_failure` is called once, from that thread.
    """

    def __init__(self, started: Sequence[tuple[Connection, Process]], devices: Sequence[object]) -> None:
        """Of ranks that were started, and what their GPUs are called."""
        self._connections = [connection for connection, _ in started]
        self._processes = [process for _, process in started]
        self._devices = list(devices)
        self.failure: SpecRTError | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._reports: list[SimpleQueue[Any]] = [SimpleQueue() for _ in started]
        self.closed = False
        self._listener = Thread(target=self._listen, daemon=True)
        self._listener.start()

    def send(self, name: str, arguments: Sequence[Any]) -> None:
        """Have every rank call a function of its executable; returns as soon as they are told."""
        message = ForkingPickler.dumps((name, tuple(arguments)))
        try:
            for connection in self._connections:
                connection.send_bytes(message)
        except OSError as error:
            self._listener.join()  # it sees the same, and knows the rank
            self.check()
            raise AssertionError("a pipe is closed, and no rank has failed") from error

    def reports(self) -> list[Any]:
        """The next report of each rank. Raises SpecRTError as `check`."""
        found = [queue.get() for queue in self._reports]
        self.check()
        return found

    def check(self) -> None:
        """Raises the SpecRTError of the first rank that failed, RUN-047 where that is none of its own."""
        if self.failure is not None:
            raise self.failure

    def close(self, *, at_once: bool = False) -> None:
        """Let them give back what they hold, in the time that `join` leaves them; or end them `at_once`."""
        self.closed = True
        for connection, process in zip(self._connections, self._processes, strict=True):
            try:
                if at_once:
                    process.kill()
                else:
                    connection.send((CLOSE, ()))
            except OSError:
                process.kill()  # its pipe is closed: it has ended, or will not hear

    def join(self) -> None:
        """Wait until they have ended, behind `close`; nothing of them is left."""
        for process in self._processes:
            _ended(process)
        self._listener.join()
        for connection in self._connections:
            connection.close()

    # -- in the thread --------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Until all pipes are closed."""
        ranks = {connection: index for index, connection in enumerate(self._connections)}
        while ranks:
            for connection in wait(list(ranks)):
                assert isinstance(connection, Connection)
                index = ranks[connection]
                try:
                    report = connection.recv()
                except (EOFError, OSError):
                    del ranks[connection]
                    code = _ended(self._processes[index])
                    if code != 0 or not self.closed:  # rank 0 may still wait for what it did not do
                        self._fail(index, f"ended with exit code {code}")
                    continue
                if isinstance(report, Failed):
                    self._fail(index, report)
                else:
                    self._reports[index].put(report)

    def _fail(self, index: int, report: Failed | str) -> None:
        """Remember the first failure and wake who waits for a report."""
        if self.failure is None:
            rank, device = index + 1, self._devices[index]
            if isinstance(report, str):
                self.failure = rank_ended(rank, device, report)
            elif report.code is None:
                self.failure = rank_ended(rank, device, f"failed: {report.message}")
            else:
                self.failure = SpecRTError(
                    report.code, f"rank {rank} on GPU {device}: {report.message}", where=report.where,
                    hint=report.hint, notes=report.notes,
                )  # fmt: skip
            for process in self._processes:  # they would wait for the one that failed
                process.kill()
            self.on_failure()
        for queue in self._reports:
            queue.put(None)


def _ended(process: Process) -> int:
    """The exit code of a process, which is ended where it does not end."""
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
