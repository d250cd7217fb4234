"""One engine in one process: the parent sends a call as a line of JSON and gets a line back.

Engines do not share memory, threads or allocators this way, and an idle one is stopped by a signal, so that all
can stay loaded and be measured in turn. An engine is a class whose methods take and return JSON values. This module
needs nothing but the standard library, because an engine may live in a virtual environment of its own.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def serve(engine: object) -> None:
    """The child's side: answer calls of the engine's methods until standard input closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not land among the answers
    for line in sys.stdin:
        name, arguments = json.loads(line)
        method: Callable[..., Any] = getattr(engine, name)
        try:
            answer = {"value": method(**arguments)}
        except Exception as error:  # noqa: BLE001 - the parent raises it again
            answer = {"error": f"{type(error).__name__}: {error}"}
        answer["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class EngineError(Exception):
    """The engine could not do what was asked; the text is its own error."""


class Worker:
    """The parent's side: an engine's process, stopped whenever it is not answering a call."""

    def __init__(self, name: str, script: str, *, python: str = sys.executable, threads: int, log: Path) -> None:
        self.name = name
        self.log = log
        self.peak_mb = 0
        cores = sorted(os.sched_getaffinity(0))[:threads]
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [python, str(HERE / script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
            )
        os.sched_setaffinity(self.process.pid, cores)

    def call(self, method: str, **arguments: object) -> Any:
        """Call a method of the engine and wait for its value; EngineError carries the engine's error."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps([method, arguments]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise EngineError(f"{self.name} ended with code {self.process.wait()}; see {self.log}")
        self.process.send_signal(signal.SIGSTOP)
        answer = json.loads(line)
        self.peak_mb = answer["peak_mb"]
        if "error" in answer:
            raise EngineError(f"{self.name}: {answer['error']}")
        return answer["value"]

    def close(self) -> None:
        """End the process and free its memory."""
        self.process.kill()
        self.process.wait()


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
