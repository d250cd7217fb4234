"""The processes of ranks, as they are started and ended on a machine with GPUs; none is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from runtime.cuda.worker import follow
from runtime.cuda.workers import Workers, start
from specs.errors import SpecRTError, Where
from tests.golden_errors import check_golden, check_raises


class Executable:
    """Does what its name says, in a process of its own."""

    cache_bytes = 7

    def __init__(self, file: Path) -> None:
        self.file = file

    def execute(self, text: str) -> None:
        with self.file.open("a") as file:
            file.write(text)

    def refuse(self) -> None:
        raise SpecRTError("RUN-040", "too small", where=Where("plan.json", 3), hint="a larger one", notes=["a note"])

    def fail(self) -> None:
        raise ValueError("out of luck")

    def vanish(self) -> None:
        os._exit(9)

    def sleep(self) -> None:
        time.sleep(600)

    def close(self) -> None:
        self.execute("closed")


def rank(connection: Connection, file: Path) -> None:
    """What each process does."""
    follow(connection, lambda: Executable(file))


def two(folder: Path) -> tuple[Workers, list[Any]]:
    started = [start(rank, folder / name) for name in "ab"]
    workers = Workers(started, [4, 5])
    assert workers.reports() == [7, 7]
    return workers, [process for _, process in started]


def test_they_do_what_they_are_told_and_end(tmp_path: Path) -> None:
    workers, processes = two(tmp_path)
    for text in ("1", "2"):
        workers.send("execute", [text])
    workers.close()
    workers.join()
    assert [process.returncode for process in processes] == [0, 0]
    assert [(tmp_path / name).read_text() for name in "ab"] == ["12closed"] * 2
    workers.check()


@pytest.mark.parametrize(("how", "golden"), [("refuse", None), ("fail", "RUN-047-failed"), ("vanish", "RUN-047-exit")])
def test_one_that_fails_ends_all(how: str, golden: str | None, tmp_path: Path) -> None:
    workers, processes = two(tmp_path)
    seen: list[SpecRTError | None] = []
    workers.on_failure = lambda: seen.append(workers.failure)
    workers._connections[1].send((how, ()))
    with pytest.raises(SpecRTError) as caught:
        workers.reports()
    if golden:
        check_golden(golden, caught.value)
    else:
        assert str(caught.value).splitlines() == [
            "error[RUN-040]: rank 2 on GPU 5: too small", "  --> plan.json:3", "  a note", "hint: a larger one",
        ]  # fmt: skip
    for process in processes:
        process.wait(20)
    with pytest.raises(SpecRTError, match=caught.value.code):
        workers.send("execute", ["3"])  # also where their pipes are closed
    workers.close(at_once=True)
    workers.join()
    assert seen == [caught.value]


def test_one_that_fails_when_all_end(tmp_path: Path) -> None:
    """Rank 0 may wait for what it has not done: it is told, though nothing is left to be raised."""
    workers, _ = two(tmp_path)
    told: list[int] = []
    workers.on_failure = lambda: told.append(1)
    workers.send("vanish", [])
    workers.close()
    workers.join()
    assert told == [1]


def test_they_are_ended_where_they_do_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.cuda.workers.PATIENCE", 0.2)
    workers, processes = two(tmp_path)
    workers.send("sleep", [])
    workers.close()
    workers.join()
    assert [process.returncode for process in processes] == [-9, -9]


def test_they_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    """Also where that is killed while they are busy, and its script has no guard against being run again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, signal, sys\n"
        "from tests.runtime.cuda.test_workers import two\n"
        "workers, processes = two(pathlib.Path(sys.argv[1]))\n"
        "workers.send('sleep', [])\n"
        "print(*(process.pid for process in processes), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    end = time.monotonic() + 20
    for pid in map(int, done.stdout.split()):
        while _runs(pid):
            assert time.monotonic() < end, f"process {pid} is left"
            time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether a process is there, and not only what its parent has yet to read of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_without_what_a_rank_needs(tmp_path: Path) -> None:
    """What the function raises itself is printed, and told as the end of the process."""
    workers = Workers([start(os.path.join, tmp_path)], [1])  # type: ignore[arg-type]
    check_raises("RUN-047-exit-1", workers.reports)
    workers.close(at_once=True)
    workers.join()
