"""A GPU that is none: device memory is a tensor, kernels run in Triton's interpreter, engines in the IR's.

With it the whole GPU runtime runs here: what is loaded where, addresses, scratch, graphs, choices. Not its speed, and
nothing of what CUDA and TensorRT do by themselves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from compiler.ir.interpreter import run, torch_dtype
from compiler.ir.parser import parse
from compiler.kernels import library
from compiler.kernels.attention import Launch
from compiler.kernels.build import Compiled
from tests.kernels.interpreted import kernel

BYTES = 5 << 20  # the interpreter copies all of it at each launch
START = 4096  # no address is 0
INTERPRETER = Lock()  # Triton's has one place for the number of the program that it runs
KERNELS: dict[str, Any] = {}
ALONE = ("normal", "codes")  # what makes weights, long before a step
LAUNCHES: dict[bytes, Launch] = {}  # by what stands for their machine code


def build(launches: Sequence[Launch], architecture: int, processes: int | None = None) -> list[Compiled]:  # noqa: ARG001
    """In place of compiling."""
    made = []
    for launch in launches:
        code = library._key(launch).encode()
        LAUNCHES[code] = launch
        made.append(Compiled(launch, architecture, code, launch.name, 128, 0, launch.name not in ALONE))
    return made


class Event:
    """A point of a device's stream: how often it was put there, and when it was passed."""

    def __init__(self, device: Device) -> None:
        self.device, self.put = device, 0
        self.times: list[float] = []

    def mark(self) -> None:
        self.put += 1
        self.device.later(lambda: self.times.append(time.perf_counter()))

    def reach(self, put: int) -> None:
        """Do what is in front of it in its stream, and in front of that in others."""
        while len(self.times) < put:
            self.device.queue.pop(0)()


class Device:
    """What runtime/cuda/driver.py offers; nothing in the stream is done before somebody waits for it.

    So what reads a result too early finds 0x55, and host memory that is written while a copy of it waits is a fault.
    On any but the first GPU it is done at once: the thread of its rank is told of the next step only.
    """

    name, capability, multiprocessors, stream = "Emulated", 90, 1, 0
    overlaps = overlap = False  # trying both ways would run everything several times more

    def __init__(self, ordinal: int = 0) -> None:
        self.ordinal = ordinal
        self.memory = torch.full((BYTES,), 0x7F, dtype=torch.uint8)  # NaN in every type: nothing may read it
        self.bytes = self.memory.numpy()
        self.used = START
        self.launched: list[str] = []
        self.queue: list[Callable[[], None]] = []

    def later(self, work: Callable[[], None]) -> None:
        """Put something into the stream."""
        self.queue.append(work)
        if self.ordinal:
            self.wait()

    def wait(self) -> None:
        while self.queue:
            self.queue.pop(0)()

    @property
    def free_memory(self) -> int:
        return BYTES - self.used

    def allocate(self, size: int) -> int:
        address = self.used
        self.used += -(-max(size, 256) // 256) * 256
        assert self.used <= BYTES
        return address

    def pinned(self, size: int) -> Any:
        return np.zeros(max(size, 1), np.uint8)

    def fill(self, address: int, bits: int, size: int, count: int) -> None:
        one = np.tile(np.frombuffer(bits.to_bytes(size, "little"), np.uint8), count)
        self.later(lambda: self._write(address, one))

    def _write(self, address: int, data: Any) -> None:
        self.bytes[address : address + len(data)] = data

    def upload(self, target: int, source: Any, size: int | None = None) -> None:
        data = source.reshape(-1).view(np.uint8)[:size]
        given = data.copy()

        def copy() -> None:
            assert np.array_equal(data, given), "written before it was copied"
            self._write(target, given)

        self.later(copy)

    def download(self, target: Any, source: int) -> None:
        data = target.reshape(-1).view(np.uint8)
        data[:] = 0x55
        self.later(lambda: np.copyto(data, self.bytes[source : source + len(data)]))

    def copy(self, target: int, source: int, size: int) -> None:
        self.later(lambda: self._write(target, self.bytes[source : source + size].copy()))

    def copy_rows(self, target: int, pitch: int, source: int, width: int, rows: int) -> None:
        for row in range(rows):
            self.copy(target + row * pitch, source + row * width, width)

    def event(self) -> Event:
        made = Event(self)
        made.mark()
        return made

    def passed(self, event: Event) -> None:
        event.reach(event.put)

    def milliseconds(self, start: Event, stop: Event) -> float:
        self.passed(stop)
        return 1e3 * (stop.times[0] - start.times[0])

    def signal(self) -> Event:
        return Event(self)

    def mark(self, signal: Event) -> None:
        assert signal.device is self
        signal.mark()

    def follow(self, signal: Event) -> None:
        put = signal.put
        self.later(lambda: signal.reach(put))

    def push(self, other: Device, target: int, source: int, size: int) -> None:
        self.later(lambda: other._write(target, self.bytes[source : source + size].copy()))

    def reaches(self, ordinal: int) -> bool:
        return ordinal == self.ordinal  # the interpreter runs one kernel at a time: none can wait for another

    def nothing(self, *_: Any) -> None:
        """Nothing is held."""

    use = close = drop = drop_graphs = reach = nothing

    def function(self, file: Path, entry: str, shared: int) -> Launch:  # noqa: ARG002
        return LAUNCHES[file.read_bytes()]

    def tensor(self, address: int, dtype: str) -> torch.Tensor:
        """The rest of memory from an address on, as elements of a type."""
        kind = torch_dtype(dtype)
        assert START <= address < self.used
        assert address % kind.itemsize == 0
        return self.memory[address : address + (self.used - address) // kind.itemsize * kind.itemsize].view(kind)

    def launch(
        self, launch: Launch, grid: Sequence[int], threads: int, shared: int, given: Sequence[int], overlap: bool
    ) -> None:
        del threads, shared
        self.launched.append(launch.name)
        assert overlap == (launch.name not in ALONE)
        left = iter(given)
        arguments = [
            None if not kind else next(left) if kind == "int" else self.tensor(next(left), kind)
            for _, kind in launch.arguments
        ]
        key = library._key(launch)
        if key not in KERNELS:
            KERNELS[key] = kernel(launch)

        def compute() -> None:
            with INTERPRETER:
                KERNELS[key][tuple(grid)](*arguments, **launch.constants)

        self.later(compute)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def replay(self, graph: Callable[[], None]) -> None:
        graph()


class _Engine:
    def __init__(self, path: Path, device: Device) -> None:
        self.graph, self.device = parse(path.read_text(encoding="utf-8")), device
        self.dynamic = tuple(
            value.name for value in self.graph.inputs if any(isinstance(dim, str) for dim in value.type.shape)
        )

    def enqueue(
        self, profile: int, use: object, scratch: int, addresses: Mapping[str, int], shapes: Mapping[str, Any]
    ) -> None:
        del profile, use, scratch
        self.device.launched.append("engine")
        self.device.later(lambda: self.compute(addresses, shapes))

    def compute(self, addresses: Mapping[str, int], shapes: Mapping[str, Any]) -> None:
        sizes: dict[str, int] = {}
        inputs = {}
        for value in self.graph.inputs:
            shape = shapes.get(value.name) or value.type.static_shape()
            sizes |= {dim: size for dim, size in zip(value.type.shape, shape, strict=True) if isinstance(dim, str)}
            inputs[value.name] = self.at(addresses[value.name], value.type.dtype, shape).clone()
        for port, tensor in run(self.graph, inputs, {}.__getitem__).items():
            dtype = next(value.type.dtype for name, value in self.graph.outputs if name == port)
            self.at(addresses[port], dtype, tensor.shape).copy_(tensor)

    def at(self, address: int, dtype: str, shape: Sequence[int]) -> torch.Tensor:
        return self.device.tensor(address, dtype)[: int(np.prod(shape, dtype=int))].reshape(tuple(shape))


class Engines(dict[str, _Engine]):
    """Segments of a bundle, interpreted."""

    memory = 1000

    def __init__(self, folder: Path, files: set[str], device: Device) -> None:
        super().__init__({file: _Engine(folder / file, device) for file in files})

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundles are compiled for, and run on, the emulated GPU."""
    for name in ("cuda", "cuda.bindings", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["cuda.bindings"].driver = sys.modules["cuda.bindings.driver"]  # type: ignore[attr-defined]
    engines = ModuleType("runtime.cuda.engines")
    engines.Engines = Engines  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "runtime.cuda.engines", engines)
    for name in ("driver", "kernels", "weights", "graphs", "steps", "collectives", "executable", "pipeline", "ranks"):
        monkeypatch.delitem(sys.modules, f"runtime.cuda.{name}", raising=False)
    monkeypatch.setattr(library, "build", build)
    import runtime.cuda.executable as executable

    monkeypatch.setattr(executable, "Device", Device)
