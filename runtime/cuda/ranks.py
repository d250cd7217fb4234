"""A bundle over several GPUs: rank 0 in this process, each other rank in a process of its own, in step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.bundle import Bundle
from runtime.cuda.collectives import Groups
from runtime.cuda.communicator import NCCL, new_id
from runtime.cuda.driver import Device, count
from runtime.cuda.executable import CUDAExecutable
from runtime.cuda.missing import cut_off, too_few
from runtime.cuda.worker import follow
from runtime.cuda.workers import Workers, start
from runtime.executable import LIKELIEST, Array, Ints

if TYPE_CHECKING:
    from runtime.cuda.graphs import Graphs

HERE = "here"  # what a rank reports when it waits for the others


@dataclass(frozen=True)
class Job:
    """What a rank needs to know: its place, what its communicators are recognized by, and sizes."""

    bundle: Path
    rank: int
    devices: tuple[int, ...]
    keys: tuple[bytes, ...]  # of all ranks, then, where both are several, of each stage's
    tokens: int
    cache_tokens: int | None


def keys_of(bundle: Bundle) -> tuple[bytes, ...]:
    """New keys for the communicators of a bundle's ranks."""
    both = bundle.tensor > 1 and bundle.pipeline > 1
    return tuple(new_id() for _ in range(1 + both * bundle.pipeline))


def connect(bundle: Bundle, job: Job, device: Device) -> Groups:
    """The communicators of a rank, once all others are there."""
    stage, place = divmod(job.rank, bundle.tensor)
    world = NCCL(device, job.keys[0], job.rank, len(job.devices))
    if bundle.tensor == 1:
        return Groups(world, None)
    if bundle.pipeline == 1:
        return Groups(world, world)
    return Groups(world, NCCL(device, job.keys[1 + stage], place, bundle.tensor))


def _load_rank(bundle: Bundle, job: Job, meet: Callable[[Bundle, Job, Device], Groups]) -> CUDAExecutable:
    return CUDAExecutable(
        bundle.of_rank(job.rank), tokens=job.tokens, cache_tokens=job.cache_tokens, device=job.devices[job.rank],
        connect=lambda device: meet(bundle, job, device),
    )  # fmt: skip


def run_rank(connection: Connection, job: Job) -> None:
    """All that the process of a rank does; its files are those that rank 0 has checked."""

    def meet(bundle: Bundle, job: Job, device: Device) -> Groups:
        connection.send(HERE)
        return connect(bundle, job, device)

    follow(connection, lambda: _load_rank(Bundle.open(job.bundle, verify=False), job, meet))


class RankedExecutable:
    """Does on all ranks what it is asked for; what it gives is rank 0's. See runtime.executable.Ahead.

    Each rank chooses the tokens for itself: all have the same logits, to the bit, and the same random numbers.
    """

    def __init__(self, bundle: Bundle, *, tokens: int, cache_tokens: int | None, devices: tuple[int, ...]) -> None:
        """Start the other ranks, and load all of them at the same time.

        Raises SpecRTError as CUDAExecutable does, for any rank; RUN-044 to RUN-047.
        """
        if not all(device < (there := count()) for device in devices):
            raise too_few(bundle.name, devices, there)
        keys = keys_of(bundle)
        jobs = [Job(bundle.path, rank, devices, keys, tokens, cache_tokens) for rank in range(len(devices))]
        self._groups: Groups | None = None
        self._midst = False  # of something that all ranks must do
        self._workers = Workers([start(run_rank, job) for job in jobs[1:]], devices[1:])
        self._workers.on_failure = self._abort
        self._loaded: CUDAExecutable | None = None
        try:
            with self._watched():
                self._loaded = _load_rank(bundle, jobs[0], self._connect)
                self.cache_bytes = self._loaded.cache_bytes + sum(self._workers.reports())
        except BaseException:
            self._midst = True
            self.close()
            raise

    def _connect(self, bundle: Bundle, job: Job, device: Device) -> Groups:
        self._workers.reports()  # all are there, or one has failed: NCCL would wait for it
        self._groups = connect(bundle, job, device)
        self._workers.check()  # one that failed before there was something to abort
        return self._groups

    # -- what the scheduler uses ----------------------------------------------------------------------------------

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._first.block_size

    @property
    def blocks(self) -> int:
        """Blocks in the cache, the same on all ranks."""
        return self._first.blocks

    @property
    def device(self) -> Device:
        """The GPU of rank 0."""
        return self._first.device

    @property
    def graphs(self) -> Graphs:
        """Those of rank 0."""
        return self._first.graphs

    def execute(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """See runtime.executable.Executable."""
        found: dict[str, Array] = self._together("execute", batch)
        return found

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See runtime.executable.Executable."""
        self._together("copy_blocks", pairs)

    def pick(self, batch: Mapping[str, Array], how: Ints = LIKELIEST) -> Ints:
        """See runtime.executable.Picks."""
        return self.wait(self.launch(batch, how=how))

    def launch(self, batch: Mapping[str, Array], sources: Sequence[int] = (), how: Ints = LIKELIEST) -> int:
        """See runtime.executable.Ahead."""
        ticket: int = self._together("launch", batch, sources, how)
        return ticket

    def wait(self, ticket: int) -> Ints:
        """See runtime.executable.Ahead."""
        with self._watched():
            return self._first.wait(ticket)

    def close(self) -> None:
        """End all ranks; at once where they are not in step."""
        if self._workers.closed:
            return
        broken = self._midst or self._workers.failure is not None
        self._workers.close(at_once=broken)
        if broken:
            self._abort()
        if self._loaded is not None:
            self._loaded.close()
        self._workers.join()

    # -- how ------------------------------------------------------------------------------------------------------

    @property
    def _first(self) -> CUDAExecutable:
        assert self._loaded is not None  # it is made with it
        return self._loaded

    def _together(self, name: str, *arguments: Any) -> Any:
        """Call a function on each rank. Raises SpecRTError RUN-048 where the last such call did not come to its end."""
        self._workers.check()
        if self._midst:
            raise cut_off()
        self._midst = True
        with self._watched():
            self._workers.send(name, arguments)
            found = getattr(self._first, name)(*arguments)
        self._midst = False
        return found

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Where a rank failed meanwhile its error is the one to raise: what followed here is none of its own."""
        try:
            yield
        except Exception:
            self._workers.check()
            raise
        self._workers.check()

    def _abort(self) -> None:
        """Let rank 0 wait for nobody, from any thread."""
        if self._groups is not None:
            self._groups.abort()
