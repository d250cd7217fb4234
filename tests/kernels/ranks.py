"""Ranks in Triton's interpreter: threads of which one runs, until it reads or writes memory and another may go on.

Which goes on is drawn, so that a seed is one of the orders in which GPUs may see each other's memory.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from triton import language
from triton.runtime import interpreter

ACCESSES = 20_000  # of memory, by all ranks: some times what a test needs


class Ranks:
    """Runs the work of ranks, each in a thread of its own, in turns drawn with `seed`."""

    def __init__(self, patch: pytest.MonkeyPatch, seed: int) -> None:
        self._draw = random.Random(seed)
        self._turn = threading.Condition()
        self._ready: list[int] = []
        self._now = -1
        self._local = threading.local()
        self._failed: list[Exception] = []
        self._left = ACCESSES
        # the language is made the interpreter's once: a thread that ends would take it from the others
        everywhere = SimpleNamespace(__globals__={"tl": language, "core": language.core})
        self._language = interpreter._patch_lang(everywhere)
        nothing = interpreter._LangPatchScope()
        patch.setattr(interpreter, "_patch_lang", lambda _: nothing)
        for name in ("create_masked_load", "create_masked_store"):
            patch.setattr(interpreter.InterpreterBuilder, name, self._switching(name))

    def _switching(self, name: str) -> Callable[..., Any]:
        inner = getattr(interpreter.InterpreterBuilder, name)

        def access(builder: Any, *given: Any) -> Any:
            place = builder.grid_idx, builder.grid_dim
            self.others()
            builder.grid_idx, builder.grid_dim = place
            return inner(builder, *given)

        return access

    def others(self, end: bool = False) -> None:
        """Let whoever is drawn run, and wait until that is this thread again."""
        rank = self._local.rank
        with self._turn:
            self._left -= 1
            if not self._left:
                raise AssertionError("a rank waits for what nobody sends")
            if end:
                self._ready.remove(rank)
            self._now = self._draw.choice(self._ready) if self._ready else -1
            self._turn.notify_all()
            if not end:
                self._wait(rank)

    def _wait(self, rank: int) -> None:
        self._turn.wait_for(lambda: self._now == rank or self._failed)
        if self._failed:
            raise AssertionError("another rank failed")

    def run(self, works: Sequence[Callable[[], None]]) -> None:
        """Run one work a rank; raises what the first that fails raised."""

        def rank_of(rank: int) -> None:
            self._local.rank = rank
            try:
                with self._turn:
                    self._wait(rank)
                works[rank]()
                self.others(end=True)
            except Exception as error:  # noqa: BLE001 - it is raised in the thread of the test
                with self._turn:
                    self._failed.append(error)
                    self._turn.notify_all()

        threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(len(works))]
        self._ready = list(range(len(works)))
        for thread in threads:
            thread.start()
        with self._turn:
            self._now = self._draw.choice(self._ready)
            self._turn.notify_all()
        for thread in threads:
            thread.join()
        self._language.restore()
        if self._failed:
            raise self._failed[0]
