"""Sums in one launch: two ranks give each other access to their memory, and take the kernel where it fits."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from compiler.ir.interpreter import torch_dtype
from compiler.kernels.attention import Launch
from compiler.kernels.build import load
from compiler.kernels.library import all_reduce
from tests.kernels.ranks import Ranks

TILE, BLOCKS = 16, 2


class Device:
    """Memory of this process in place of a GPU's: an address is one for every rank."""

    def __init__(self, ordinal: int, reached: bool) -> None:
        self.ordinal, self._reached = ordinal, reached
        self.memory: list[torch.Tensor] = []
        self.opened: list[int] = []

    def reaches(self, ordinal: int) -> bool:
        return self._reached or ordinal == self.ordinal

    def allocate(self, size: int) -> int:
        self.memory.append(torch.full((size,), 0x7F, dtype=torch.uint8))
        return self.memory[-1].data_ptr()

    def share(self, size: int) -> tuple[int, bytes]:
        address = self.allocate(size)
        return address, address.to_bytes(64, "little")

    def open(self, handle: bytes) -> int:
        self.opened.append(int.from_bytes(handle, "little"))
        return self.opened[-1]

    def fill(self, address: int, bits: int, size: int, count: int) -> None:
        at(address, size * count)[:] = np.frombuffer(bits.to_bytes(size, "little") * count, np.uint8)

    def upload(self, target: int, source: Any) -> None:
        at(target, source.nbytes)[:] = source.view(np.uint8)

    write = upload

    def download(self, target: Any, source: int) -> None:
        target.reshape(-1).view(np.uint8)[:] = at(source, target.nbytes)

    def wait(self) -> None:
        """Everything is done at once."""


def at(address: int, size: int) -> Any:
    """Bytes of memory."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


class Kernel:
    """Runs in Triton's interpreter when it is launched."""

    def __init__(self, made: Launch, blocks: int = 100) -> None:
        self.made, self.constants, self.blocks, self.launched = made, made.constants, blocks, 0

    def resident(self) -> int:
        return self.blocks

    def launch(self, grid: Sequence[int], values: dict[str, int]) -> None:
        self.launched += 1
        given: list[Any] = []
        for name, kind in self.made.arguments:
            if kind in ("", "int"):
                given.append(values[name] if kind else None)
            else:
                size = 4 if kind in ("i32", "f32") else 2
                memory = torch.from_numpy(at(values[name], size))
                given.append(memory.view(torch.int16 if kind == "i16" else torch_dtype(kind)))
        load(self.made)[tuple(grid)](*given, **self.constants)


class Group:
    """The other way to pass numbers on: what each has given, when all have."""

    def __init__(self, rank: int, given: list[list[bytes]], others: Callable[[], None]) -> None:
        self.rank, self.size = rank, len(given)
        self._given, self._others = given, others
        self.calls: list[str] = []

    def all_gather(self, source: int, target: int, count: int, dtype: str) -> None:
        assert dtype == "u8"
        mine = self._given[self.rank]
        mine.append(bytes(at(source, count)))
        while min(map(len, self._given)) < len(mine):
            self._others()
        whole = b"".join(given[len(mine) - 1] for given in self._given)
        at(target, len(whole))[:] = np.frombuffer(whole, np.uint8)

    def all_reduce(self, source: int, target: int, count: int, dtype: str, operation: str = "sum") -> None:
        del source, target
        self.calls.append(f"{operation} {count} {dtype}")

    def abort(self) -> None:
        self.calls.append("abort")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, which imports a driver that is not here."""
    for name in ("cuda", "cuda.bindings", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["cuda.bindings"].driver = sys.modules["cuda.bindings.driver"]  # type: ignore[attr-defined]
    for name in ("driver", "kernels", "peers"):
        monkeypatch.delitem(sys.modules, f"runtime.cuda.{name}", raising=False)
    import runtime.cuda.peers as module

    return module


def on_each(patch: pytest.MonkeyPatch, work: Callable[[Group, Device], Any], reached: Sequence[bool]) -> list[Any]:
    """What the work of each rank gives."""
    ranks = Ranks(patch, seed=1)
    given: list[list[bytes]] = [[] for _ in reached]
    found: list[Any] = [None] * len(reached)

    def run(rank: int) -> None:
        found[rank] = work(Group(rank, given, ranks.others), Device(rank, reached[rank]))

    ranks.run([lambda rank=rank: run(rank) for rank in range(len(reached))])
    return found


@pytest.mark.parametrize("width", [8, 3])
def test_small_sums_are_one_launch(monkeypatch: pytest.MonkeyPatch, peers: ModuleType, width: int) -> None:
    """All else is done by the communicator: too many numbers, other types and operations."""
    counts = (width, 4 * width, 32, 2 * width)

    def work(group: Group, device: Device) -> Any:
        kernel = Kernel(all_reduce("f16", width, 2, BLOCKS, tile=TILE))
        made = peers.peers(group, device, {"all_reduce.f16": kernel, "choose": None})
        sums = []
        for count in counts:
            x = torch.arange(count).half() + 100 * group.rank
            made.all_reduce(x.data_ptr(), x.data_ptr(), count, "f16")
            sums.append(x)
        for count, dtype, operation in ((40, "f16", "sum"), (8, "f32", "sum"), (8, "f16", "max")):
            made.all_reduce(0, 0, count, dtype, operation)
        made.abort()
        assert at(made.stop, 4).view(np.int32) == 1
        y = torch.zeros(8).half()
        made.all_reduce(y.data_ptr(), y.data_ptr(), width, "f16")  # alone, with any result
        return sums, group.calls, kernel.launched, device.opened

    found = on_each(monkeypatch, work, [True, True])
    for sums, calls, launched, opened in found:
        for count, x in zip(counts, sums, strict=True):
            assert torch.equal(x, 2 * torch.arange(count).half() + 100)
        assert calls == ["sum 40 f16", "sum 8 f32", "max 8 f16", "abort"]
        assert launched == len(counts) + 1
        assert len(opened) == 1  # the other's rooms


def test_memory_that_is_not_reached(monkeypatch: pytest.MonkeyPatch, peers: ModuleType) -> None:
    """One GPU that does not reach another is enough for all to sum as they did."""

    def work(group: Group, device: Device) -> bool:
        return (
            peers.peers(group, device, {"all_reduce.f16": Kernel(all_reduce("f16", 8, 3, BLOCKS, tile=TILE))}) is group
        )

    assert on_each(monkeypatch, work, [True, False, True]) == [True, True, True]
