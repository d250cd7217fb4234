"""A bundle whose products are shared by several GPUs: rank 0 in this process, each other in one of its own, in step.

Where there are stages too, a rank is one of those that share each product, in all stages: it has a GPU in each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from runtime.bundle import Bundle
from runtime.cuda.communicator import NCCL, Communicator, new_id
from runtime.cuda.driver import Device, count
from runtime.cuda.executable import CUDAExecutable
from runtime.cuda.kernels import Kernels
from runtime.cuda.missing import check_there, cut_off
from runtime.cuda.peers import peers
from runtime.cuda.pipeline import Pipeline
from runtime.cuda.worker import follow
from runtime.cuda.workers import Workers, start
from runtime.executable import LIKELIEST, Array, Ints

HERE = "here"  # what a rank reports when it waits for the others


@dataclass(frozen=True)
class Job:
    """What a rank needs to know: its place, what its communicators are recognized by, and sizes."""

    bundle: Path
    rank: int
    ranks: int
    devices: tuple[int, ...]  # one for each stage, as of the keys
    keys: tuple[bytes, ...]
    tokens: int
    cache_tokens: int | None


def connect(job: Job, stage: int, device: Device) -> Communicator:
    """What passes between the ranks of a stage, once all of them are there."""
    return NCCL(device, job.keys[stage], job.rank, job.ranks)


def join_ranks(job: Job, stage: int, device: Device, kernels: Kernels) -> Communicator:
    """The same, with sums in one launch where they can be."""
    return peers(connect(job, stage, device), device, kernels.others)


Join = Callable[[Job, int, Device, Kernels], Communicator]


def _load_rank(bundle: Bundle, job: Job, meet: Callable[[], object], join: Join) -> CUDAExecutable | Pipeline:
    """A rank's executable; it calls `meet` when all its stages are ready, then `join` of each."""
    own = bundle.of_rank(job.rank)
    if len(job.devices) > 1:
        return Pipeline(
            own, devices=job.devices, tokens=job.tokens, cache_tokens=job.cache_tokens, meet=meet,
            connect=lambda stage, device, kernels: join(job, stage, device, kernels),
        )  # fmt: skip

    def met(device: Device, kernels: Kernels) -> Communicator:
        meet()
        return join(job, 0, device, kernels)

    return CUDAExecutable(
        own, tokens=job.tokens, cache_tokens=job.cache_tokens, device=job.devices[0], connect=met
    )  # fmt: skip


def run_rank(connection: Connection, job: Job) -> None:
    """All that the process of a rank does; its files are those that rank 0 has checked."""
    follow(
        connection,
        lambda: _load_rank(Bundle.open(job.bundle, verify=False), job, lambda: connection.send(HERE), join_ranks),
    )


class RankedExecutable:
    """Does on all ranks what it is asked for; what it gives is rank 0's. See runtime.executable.Ahead.

    Each rank chooses the tokens for itself: all have the same logits, to the bit, and the same random numbers.
    """

    def __init__(self, bundle: Bundle, *, tokens: int, cache_tokens: int | None, devices: tuple[int, ...]) -> None:
        """Start the other ranks, and load all of them at the same time.

        Raises SpecRTError as CUDAExecutable does, for any rank; RUN-044 to RUN-047.
        """
        check_there(bundle.name, devices, count())
        keys = tuple(new_id() for _ in range(bundle.pipeline))
        ranks = bundle.tensor
        jobs = [
            Job(bundle.path, rank, ranks, devices[rank::ranks], keys, tokens, cache_tokens) for rank in range(ranks)
        ]
        self._groups: list[Communicator] = []
        self._midst = False  # of something that all ranks must do
        places = [", ".join(map(str, job.devices)) for job in jobs[1:]]
        self._workers = Workers([start(run_rank, job) for job in jobs[1:]], places)
        self._workers.on_failure = self._abort
        self._loaded: CUDAExecutable | Pipeline | None = None
        try:
            with self._watched():
                # all are there, or one has failed: NCCL would wait for it
                self._loaded = _load_rank(bundle, jobs[0], self._workers.reports, self._connect)
                self.cache_bytes = self._loaded.cache_bytes + sum(self._workers.reports())
        except BaseException:
            self._midst = True
            self.close()
            raise

    def _connect(self, job: Job, stage: int, device: Device, kernels: Kernels) -> Communicator:
        group = self._watch(connect(job, stage, device))
        return self._watch(peers(group, device, kernels.others))

    def _watch(self, group: Communicator) -> Communicator:
        self._groups.append(group)
        self._workers.check()  # one that failed before there was something to abort
        return group

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
        """The first GPU of rank 0."""
        return self._first.devices[0]

    @property
    def devices(self) -> list[Device]:
        """The GPUs of rank 0."""
        return self._first.devices

    @property
    def stages(self) -> int:
        """See runtime.executable.Ahead."""
        return self._first.stages

    @property
    def choices(self) -> dict[str, Any]:
        """What rank 0 measured, and all chose."""
        return self._first.choices

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

    def launch(
        self, batch: Mapping[str, Array], sources: Sequence[int] = (), how: Ints = LIKELIEST, behind: int = 1
    ) -> int:
        """See runtime.executable.Ahead."""
        ticket: int = self._together("launch", batch, sources, how, behind)
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
    def _first(self) -> CUDAExecutable | Pipeline:
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
        for group in list(self._groups):
            group.abort()
