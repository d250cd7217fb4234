"""Emulates what a report needs, several processes at a time; what a killed run had finished is not computed again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from compiler.validate.emulate import Subject, emulate
from compiler.validate.matrix import Model
from compiler.validate.records import digest
from specs.errors import SpecRTError
from specs.precision import load_recipe

Progress = Callable[[str, int, int], None]
PACKAGES = ("specs", "compiler", "runtime")


@cache
def code_digest() -> str:
    """The SHA-256 of our own source: numbers are computed again when it changes."""
    root = Path(__file__).resolve().parents[2]
    found = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


def key(subject: Subject, precision: str) -> str:
    """What the numbers of a cell depend on, as a name for their file."""
    content: list[Any] = [
        code_digest(),
        subject.size,
        subject.rows,
        subject.seed,
        load_recipe(precision).model_dump(exclude={"bound"}),
    ]
    for path in (subject.source, subject.checkpoint, subject.calibration):
        content.append(None if path is None else _content(path))
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:32]


def _content(path: Path) -> Any:
    """A spec's digest; of a folder, names, sizes and times of its files."""
    if path.is_file():
        return digest(path) if path.suffix == ".yaml" else hashlib.sha256(path.read_bytes()).hexdigest()
    return sorted(
        (item.name, item.stat().st_size, item.stat().st_mtime_ns) for item in path.iterdir() if item.is_file()
    )


def emulate_all(
    models: Sequence[Model],
    precisions: Sequence[str],
    folder: Path,
    *,
    jobs: int | None = None,
    ray: str | None = None,
    progress: Progress | None = None,
) -> dict[tuple[str, str], dict[str, Any]]:
    """The numbers of every model in every precision; `folder` keeps each as a file of its own.

    `jobs` processes with one thread each, by default as many as there are cores; or the workers of a Ray cluster at
    the address `ray`. Raises SpecRTError VAL-004 where Ray is asked for and not installed or not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {(model.name, name): folder / f"{key(model.subject, name)}.json" for model in models for name in precisions}
    found = {place: json.loads(path.read_text(encoding="utf-8")) for place, path in files.items() if path.is_file()}
    total, done = len(files), len(found)
    if progress is not None:
        progress("emulate", done, total)
    work = {
        model.name: (model.subject, tuple(name for name in precisions if (model.name, name) not in found))
        for model in models
    }
    work = {name: item for name, item in work.items() if item[1]}
    run = _in_processes if ray is None else _on_ray
    for model, precision, numbers in run(work, jobs or len(os.sched_getaffinity(0)), ray or ""):
        path = files[model, precision]
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(numbers), encoding="utf-8")
        partial.replace(path)
        found[model, precision] = numbers
        done += 1
        if progress is not None:
            progress("emulate", done, total)
    return found


Work = Mapping[str, tuple[Subject, tuple[str, ...]]]


def _one(name: str, subject: Subject, precision: str) -> tuple[str, str, dict[str, Any]]:
    """In a process of its own: one cell."""
    import torch

    torch.set_num_threads(1)
    ((_, numbers),) = emulate(subject, [precision], threads=1)
    return name, precision, numbers


def _in_processes(work: Work, jobs: int, _: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    tasks = [(name, subject, precision) for name, (subject, missing) in work.items() for precision in missing]
    if not tasks:
        return
    # spawned, not forked: PyTorch and OpenVINO have threads, which a fork loses
    with ProcessPoolExecutor(min(jobs, len(tasks)), get_context("spawn")) as pool:
        futures = [pool.submit(_one, *task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _on_ray(work: Work, _: int, address: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    try:
        import ray
    except ImportError as error:
        raise SpecRTError("VAL-004", "Ray is not installed", hint="`pip install 'specrt[ray]'`") from error
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        message = f"no Ray cluster answers at `{address}`"
        raise SpecRTError(
            "VAL-004", message, hint="start one with `ray start --head`, then name its address"
        ) from error
    try:
        remote = ray.remote(num_cpus=1)(_one)
        waiting = [
            remote.remote(name, subject, precision)
            for name, (subject, missing) in work.items()
            for precision in missing
        ]
        while waiting:
            ready, waiting = ray.wait(waiting)
            yield from ray.get(ready)
    finally:
        ray.shutdown()
