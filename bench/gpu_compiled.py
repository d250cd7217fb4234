"""Kernels compiled here and timed where the GPU is: what the benches of kernels have in common."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SPREAD = 300e6  # bytes that timed calls go through in turn: several times the L2 cache


def compile_kernels(folder: Path, launches: Sequence[Any], document: dict[str, Any]) -> None:
    """Compile for sm_90 into FOLDER, and write `document` with them under `kernels` as list.json."""
    from compiler.kernels.build import build

    start = time.perf_counter()
    document["kernels"] = []
    for number, made in enumerate(build(launches, 90)):
        (folder / f"{number}.cubin").write_bytes(made.cubin)
        document["kernels"].append(
            made.as_dict(f"{number}.cubin") | {"arguments": made.arguments, "constants": made.launch.constants}
        )
    print(f"{len(launches)} kernels in {time.perf_counter() - start:.0f} s")
    (folder / "list.json").write_text(json.dumps(document))


class Compiled:
    """The kernels of a folder on a device."""

    def __init__(self, folder: Path, ordinal: int = 0) -> None:
        from runtime.cuda.driver import Device

        self.folder = folder
        self.list = json.loads((folder / "list.json").read_text())
        self.device = Device(ordinal)
        self._kernels: dict[int, Any] = {}

    def kernel(self, number: int) -> Any:
        """A kernel of the list, loaded once."""
        from runtime.cuda.kernels import Kernel

        if number not in self._kernels:
            made = self.list["kernels"][number]
            function = self.device.function(self.folder / made["file"], made["entry"], made["shared"])
            self._kernels[number] = Kernel(self.device, function, made["threads"], made["shared"],
                                           tuple(made["arguments"]), made["constants"], made["overlap"])  # fmt: skip
        return self._kernels[number]

    def time(self, calls: Sequence[Callable[[], None]], rounds: int = 5, repeat: int | None = None) -> float:
        """Milliseconds of one call, the median of `rounds` replays of a graph of all, each `repeat` times."""
        repeat = repeat or max(1, 20 // len(calls))

        def work() -> None:
            for _ in range(repeat):
                for call in calls:
                    call()

        work()
        self.device.wait()
        graph = self.device.capture(work)
        self.device.replay(graph)
        found = []
        for _ in range(rounds):
            start = self.device.event()
            self.device.replay(graph)
            found.append(self.device.milliseconds(start, self.device.event()))
        self.device.drop(graph)
        return statistics.median(found) / (repeat * len(calls))


def torch_time(calls: Sequence[Callable[[], Any]], rounds: int = 5) -> float:
    """The same for PyTorch's kernels."""
    import torch

    repeat = max(1, 20 // len(calls))
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for call in calls:
                call()
    graph.replay()
    found = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop))
    return float(statistics.median(found)) / (repeat * len(calls))
