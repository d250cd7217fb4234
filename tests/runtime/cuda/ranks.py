"""Several emulated GPUs: a rank is a thread of this process, and what they exchange passes from one to the other."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from tests.runtime.cuda.emulated import Device

PATIENCE = 60.0  # seconds: a rank that waits longer waits for nobody
OPERATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add, "min": torch.minimum, "max": torch.maximum
}  # fmt: skip


class Exchange:
    """Where the ranks of a communicator meet."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.given: list[Any] = [None] * size

    def swap(self, rank: int, value: Any) -> list[Any]:
        """Each rank's value, once all have given theirs."""
        self.given[rank] = value
        self.barrier.wait(PATIENCE)
        found = list(self.given)
        self.barrier.wait(PATIENCE)
        return found


class Communicator:
    """What runtime/cuda/communicator.py offers, between threads; sums are made in the order of ranks, in float32."""

    def __init__(self, device: Device, exchange: Exchange, rank: int) -> None:
        self.device, self.exchange, self.rank, self.size = device, exchange, rank, exchange.size
        self.calls: list[tuple[str, int]] = []
        self.aborted = self.closed = False

    def _later(self, name: str, count: int, work: Callable[[], None]) -> None:
        assert not self.closed

        def done() -> None:
            try:
                work()
            except threading.BrokenBarrierError:
                assert self.aborted or self.exchange.barrier.broken  # goes on, with any result

        self.calls.append((name, count))
        self.device.later(done)

    def _at(self, address: int, count: int, dtype: str) -> torch.Tensor:
        return self.device.tensor(address, dtype)[:count]

    def all_reduce(self, source: int, target: int, count: int, dtype: str, operation: str = "sum") -> None:
        def work() -> None:
            each = self.exchange.swap(self.rank, self._at(source, count, dtype).clone())
            total = each[0].float() if each[0].is_floating_point() else each[0]
            for one in each[1:]:
                total = OPERATIONS[operation](total, one.to(total.dtype))
            self._at(target, count, dtype).copy_(total)

        self._later("all_reduce", count, work)

    def all_gather(self, source: int, target: int, count: int, dtype: str) -> None:
        def work() -> None:
            each = self.exchange.swap(self.rank, self._at(source, count, dtype).clone())
            self._at(target, count * self.size, dtype).copy_(torch.cat(each))

        self._later("all_gather", count, work)

    def abort(self) -> None:
        self.aborted = True
        self.exchange.barrier.abort()

    def close(self) -> None:
        self.closed = True


class Worker(threading.Thread):
    """In place of a process."""

    def __init__(self, work: Callable[[], None], connection: Connection) -> None:
        super().__init__(daemon=True)
        self.work, self.connection, self.killed = work, connection, False
        self.ending = threading.Lock()
        self.start()

    def run(self) -> None:
        try:
            self.work()
        finally:
            with self.ending:
                self.connection.close()

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        assert not self.is_alive()
        return 0

    def kill(self) -> None:
        """A thread can't be ended: it hears no more."""
        self.killed = True
        with self.ending:
            if not self.connection.closed:
                with socket.socket(fileno=os.dup(self.connection.fileno())) as pipe:
                    pipe.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def gpus(gpu: None, monkeypatch: pytest.MonkeyPatch) -> list[Worker]:  # noqa: ARG001
    """The runtime on emulated GPUs; gives the workers that were started, in order."""
    ranks = importlib.import_module("runtime.cuda.ranks")  # `gpu` has made modules anew, which packages do not know
    started: list[Worker] = []
    exchanges: dict[bytes, Exchange] = {}
    lock = threading.Lock()

    def start(function: Callable[..., None], *arguments: Any) -> tuple[Connection, Worker]:
        mine, theirs = Pipe()
        worker = Worker(lambda: function(theirs, *arguments), theirs)
        started.append(worker)
        return mine, worker

    def communicator(device: Any, key: bytes, rank: int, size: int) -> Communicator:
        with lock:
            exchange = exchanges.setdefault(key, Exchange(size))
        return Communicator(device, exchange, rank)

    keys = iter(range(1000))
    monkeypatch.setattr(ranks, "start", start)
    for module in (ranks, sys.modules["runtime.cuda.pipeline"]):
        monkeypatch.setattr(module, "count", lambda: 8)
    monkeypatch.setattr(ranks, "NCCL", communicator)
    monkeypatch.setattr(ranks, "new_id", lambda: bytes([next(keys)]))
    return started
