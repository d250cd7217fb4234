"""A progress line on stderr while something long runs, and how long each stage took."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from compiler.cli.console import stderr

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Stages:
    """`with Stages("first") as stages: work(progress=stages.report)`; silent where stderr is no terminal or `quiet`."""

    def __init__(self, first: str, *, quiet: bool = False) -> None:
        self._first = first
        self._quiet = quiet or not sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._begins: dict[str, float] = {}
        self._end = 0.0

    def __enter__(self) -> Stages:
        if not self._quiet:
            from rich.progress import (
                BarColumn,
                Progress,
                SpinnerColumn,
                TaskProgressColumn,
                TextColumn,
                TimeElapsedColumn,
            )

            self._progress = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(32), TaskProgressColumn(),
                TimeElapsedColumn(), console=stderr(), transient=True,
            )  # fmt: skip
            self._progress.start()
            self._task = self._progress.add_task(self._first, total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end = time.perf_counter()
        if self._progress is not None:
            self._progress.stop()

    def say(self, text: str) -> None:
        """What goes on now, where nothing reports itself."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text)

    def report(self, stage: str, done: int, total: int) -> None:
        """What `compile` calls: `done` of `total` in `stage`."""
        if stage not in self._begins:
            self._begins[stage] = time.perf_counter()
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=stage, completed=done, total=total or None)

    def seconds(self) -> dict[str, float]:
        """How long each reported stage took: until the next one began, the last until the block ended."""
        end = self._end or time.perf_counter()
        times = [*self._begins.values(), end]
        return {name: times[index + 1] - times[index] for index, name in enumerate(self._begins)}
