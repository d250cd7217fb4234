"""A model in stages, each on a GPU of its own: all of them driven by one process, each at work on another step.

A step is put into the streams of all stages at once. What a stage hands on is copied to the next one's memory, and
events order the streams: no stage waits for the host, and none for a later one. Tokens that the last stage chose go to
where the first begins, so a step can be started before the host has read them. A decode step is one graph a stage, so
one thread keeps all of them busy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier, BrokenBarrierError
from typing import Any, TypeVar

from runtime.bundle import Bundle
from runtime.cache import Cached
from runtime.cuda.arena import SETS, handed, value_bytes
from runtime.cuda.batch import WORD
from runtime.cuda.communicator import Communicator
from runtime.cuda.driver import Device, count
from runtime.cuda.executable import CUDAExecutable
from runtime.cuda.kernels import Kernels
from runtime.cuda.missing import check_there
from runtime.cuda.turns import Turn
from runtime.executable import LIKELIEST, Array, Ints
from runtime.program import Program

T = TypeVar("T")


class _Inbox:
    """Where values arrive at a stage, of two steps in turn: one set is read while the other is written."""

    def __init__(self, program: Program, most: Mapping[str, int], sender: Device, receiver: Device) -> None:
        self._program, self._sender, self._receiver = program, sender, receiver
        self._places, size = handed(program, most)
        self._sets = [receiver.allocate(size) for _ in range(SETS)]
        self._arrived, self._emptied = ([device.signal() for _ in range(SETS)] for device in (sender, receiver))

    def send(self, number: int, values: Mapping[str, int], dims: Mapping[str, int]) -> None:
        """Behind the steps of the stage before: copy its values here, once those of two steps ago are taken out."""
        turn = number % SETS
        self._sender.follow(self._emptied[turn])
        for name, place in self._places.items():
            size = value_bytes(self._program, name, dims)
            self._sender.push(self._receiver, self._sets[turn] + place, values[name], size)
        self._sender.mark(self._arrived[turn])

    def receive(self, number: int, values: Mapping[str, int], dims: Mapping[str, int]) -> None:
        """In front of the steps of this stage: take the values out, to where its graphs read them."""
        turn = number % SETS
        self._receiver.follow(self._arrived[turn])
        for name, place in self._places.items():
            self._receiver.copy(values[name], self._sets[turn] + place, value_bytes(self._program, name, dims))
        self._receiver.mark(self._emptied[turn])


class _Chosen:
    """The tokens of the last steps, at a stage that reads tokens; one step more than there are stages."""

    def __init__(self, sender: Device, receiver: Device, size: int, count: int) -> None:
        self._sender, self._receiver = sender, receiver
        self._sets = [receiver.allocate(size) for _ in range(count)]
        self._told = [sender.signal() for _ in range(count)]

    def send(self, number: int, tokens: int, size: int) -> None:
        """Behind the last stage: copy what it chose.

        What was here before has been read: by steps that are through the first stage, and so in front of this one.
        """
        turn = number % len(self._sets)
        self._sender.push(self._receiver, self._sets[turn], tokens, size)
        self._sender.mark(self._told[turn])

    def receive(self, number: int) -> int:
        """The address of a step's tokens, which what comes in the stream waits for."""
        turn = number % len(self._sets)
        self._receiver.follow(self._told[turn])
        return self._sets[turn]


class _Stage(CUDAExecutable):
    """Some neighbouring steps of a plan on a GPU."""

    inbox: _Inbox | None = None
    chosen: _Chosen | None = None

    def __init__(self, bundle: Bundle, stages: int, **options: Any) -> None:
        """As a CUDAExecutable, of a bundle whose program is the stage's."""
        self.stages = stages
        self._number = 0
        super().__init__(bundle, **options)

    @property
    def reads_tokens(self) -> bool:
        """Whether a step of it looks up tokens."""
        return any("tokens" in step.inputs.values() for step in self._program.steps)

    def connect(self, before: _Stage | None, last: _Stage) -> None:
        """Make room for what comes from the stage before, and for tokens from the last one."""
        if before is not None:
            before._device.reach(self._device)
            self._device.use()
            self.inbox = _Inbox(self._program, self._most, before._device, self._device)
        if self.reads_tokens and last._program.cache is not None:
            if last is not self:
                last._device.reach(self._device)
            self._device.use()
            self.chosen = _Chosen(last._device, self._device, WORD * self._most.get("N", 1), self.stages + 1)

    def run(
        self, number: int, batch: Mapping[str, Array], sources: Sequence[int], how: Ints, behind: int
    ) -> tuple[dict[str, int], Turn]:
        """Put its part of a step into its stream."""
        self._number, turn = number, self._turns.take()
        if sources and self.chosen is not None:
            self._chosen = self.chosen.receive(number - behind)
            return self._run(batch, turn, sources, how), turn
        return self._run(batch, turn, (), how), turn

    def _arrive(self, dims: Mapping[str, int]) -> None:
        if self.inbox is not None:
            self.inbox.receive(self._number, self._values, dims)

    def hand_on(self, after: _Stage, dims: Mapping[str, int], turn: Turn) -> None:
        """Behind its part of a step: send what the next stage reads."""
        assert after.inbox is not None  # they are connected
        after.inbox.send(self._number, self._values, dims)
        turn.done = self._device.event()  # its arrays have been read there

    def finish(self, stages: Sequence[_Stage], rows: int, turn: Turn) -> int:
        """Behind the last part of a step: send what was chosen to the stages and to the host; gives the ticket."""
        for stage in stages:
            if stage.chosen is not None:
                stage.chosen.send(self._number, self._tokens, WORD * rows)
        return self._turns.started(turn, self._tokens, rows)


class _Meeting:
    """Where the threads meet that load the stages, a thread each; `abort` lets those go that wait."""

    def __init__(self, count: int) -> None:
        self._barrier = Barrier(count)
        self._given: list[int] = []
        self._found: object = None
        self.abort = self._barrier.abort

    def __call__(self, settle: Callable[[list[int]], T], value: int = 0) -> T:
        """What one of them makes of the values of all."""
        self._given.append(value)
        if self._barrier.wait() == 0:
            self._found = settle(self._given)
            self._given = []
        self._barrier.wait()
        found: T = self._found  # type: ignore[assignment]
        return found


class Pipeline(Cached):
    """A bundle of several stages on as many GPUs, as an Executable that takes steps ahead."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        devices: Sequence[int],
        tokens: int,
        cache_tokens: int | None = None,
        graphs: bool = True,
        meet: Callable[[], object] = lambda: None,
        connect: Callable[[int, Device, Kernels], Communicator] | None = None,
    ) -> None:
        """Load all stages at once, one on each of `devices`; the rest as CUDAExecutable.

        As one of several ranks it calls `meet` when all stages are ready, then `connect` of each, in a thread each.
        Raises SpecRTError RUN-044 where the machine has fewer GPUs, and what CUDAExecutable raises, for any stage.
        """
        check_there(bundle.name, devices, count())
        self.stages = len(devices)
        meeting = _Meeting(self.stages)

        def load(index: int) -> _Stage:
            def connected(device: Device, kernels: Kernels) -> Communicator:
                meeting(lambda _: meet())
                assert connect is not None  # else this is not called
                return connect(index, device, kernels)

            try:
                return _Stage(
                    bundle.of_stage(index), self.stages, tokens=tokens, cache_tokens=cache_tokens, graphs=graphs,
                    device=devices[index], connect=None if connect is None else connected,
                    agree=lambda blocks: meeting(min, blocks),
                )  # fmt: skip
            except BaseException:
                meeting.abort()
                raise

        with ThreadPoolExecutor(self.stages) as pool:
            loaded = [pool.submit(load, index) for index in range(self.stages)]
        self._stages = [future.result() for future in loaded if future.exception() is None]
        self._number = 0
        try:
            _raise(loaded)
            sizes = [stage.size for stage in self._stages if stage.size is not None]
            self.size = replace(sizes[0], block_bytes=sum(size.block_bytes for size in sizes)) if sizes else None
            for before, stage in zip((None, *self._stages), self._stages, strict=False):
                stage.connect(before, self._stages[-1])
        except BaseException:
            self.close()
            raise

    @property
    def devices(self) -> list[Device]:
        """The GPUs of the stages."""
        return [stage.device for stage in self._stages]

    @property
    def choices(self) -> dict[str, Any]:
        """What each stage measured, and chose."""
        return {str(index): stage.graphs.choices for index, stage in enumerate(self._stages)}

    def execute(self, batch: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run a step through all stages and copy the outputs to the host; see runtime.executable.Executable."""
        dims, _ = self._pass(batch)
        return self._stages[-1].outputs(dims)

    def pick(self, batch: Mapping[str, Array], how: Ints = LIKELIEST) -> Ints:
        """Run, and choose tokens where the logits are; see runtime.executable.Picks."""
        return self.wait(self.launch(batch, how=how))

    def launch(
        self, batch: Mapping[str, Array], sources: Sequence[int] = (), how: Ints = LIKELIEST, behind: int = 1
    ) -> int:
        """Put a step into the streams of all stages and give its ticket; see runtime.executable.Ahead."""
        dims, turn = self._pass(batch, sources, how, behind)
        return self._stages[-1].finish(self._stages, dims["N"], turn)

    def wait(self, ticket: int) -> Ints:
        """The tokens that a step chose, once it is through; see runtime.executable.Ahead."""
        return self._stages[-1].wait(ticket)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Put copies of blocks into the stream of each stage; see runtime.executable.Executable."""
        for stage in self._stages:
            stage.copy_blocks(pairs)

    def close(self) -> None:
        """Give back everything, once what is on its way between the stages is done."""
        for stage in self._stages:
            stage.device.use()
            stage.device.wait()
        for stage in self._stages:
            stage.close()
        self._stages = []

    def _pass(
        self, batch: Mapping[str, Array], sources: Sequence[int] = (), how: Ints = LIKELIEST, behind: int = 1
    ) -> tuple[dict[str, int], Turn]:
        """Put a step into the stream of each stage; gives its sizes, and the turn of the last stage."""
        self._number += 1
        for stage, after in zip(self._stages, (*self._stages[1:], None), strict=True):
            dims, turn = stage.run(self._number, batch, sources, how, behind)
            if after is not None:
                stage.hand_on(after, dims, turn)
        return dims, turn


def _raise(loaded: Sequence[Future[_Stage]]) -> None:
    """What made loading fail; the stages that waited for that one broke off only."""
    errors = [error for future in loaded if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, BrokenBarrierError):
            raise error
    assert not errors  # a barrier is broken by who fails
