"""Sums over two GPUs in one launch on real ones: right over many replays, and how long beside NCCL.

python bench/gpu_all_reduce.py compile FOLDER            anywhere: cubins (triton)
python bench/gpu_all_reduce.py run FOLDER OUT [REPLAYS]  where the GPUs are: checks and times (torch, cuda-bindings)
"""

from __future__ import annotations

import json
import queue
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Timer
from typing import Any

from gpu_compiled import Compiled, compile_kernels

RANKS = 2
WIDTH = 4096
MOST = 8 << 20  # bytes
TILES = ((256, 1), (512, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8))  # with warps
SIZES = [1 << power for power in range(12, 24)]  # bytes
REPEAT = 50
PATIENCE = 75  # seconds for the work of both
BANK = 7  # different sources, taken in turn
SUMS = (("f16", 4096), ("f16", 262144), ("f16", 264), ("f32", 4100), ("bf16", 65536), ("odd", 333), ("f16", 1 << 20))


def compile_all(folder: Path) -> None:
    """Write cubins and list.json."""
    from compiler.kernels.library import all_reduce

    folder.mkdir(parents=True, exist_ok=True)
    launches = [all_reduce("f16", WIDTH, RANKS, MOST // 2 // tile, tile, warps) for tile, warps in TILES]
    launches += [all_reduce(dtype, WIDTH, RANKS, 1024) for dtype in ("f16", "f32", "bf16")]
    launches.append(all_reduce("f16", 333, RANKS, 1024))
    compile_kernels(folder, launches, {"tiles": TILES, "checked": ["f16", "f32", "bf16", "odd"]})


class Rank(Compiled):
    """One of the processes."""

    def __init__(self, folder: Path, key: bytes, rank: int) -> None:
        import torch

        from runtime.cuda.communicator import NCCL
        from runtime.cuda.peers import peers

        self.torch, self.rank = torch, rank
        torch.cuda.set_device(rank)
        torch.zeros(1, device="cuda")
        super().__init__(folder, rank)
        self.nccl = NCCL(self.device, key, rank, RANKS)
        count = len(self.list["tiles"])
        self.tiles = {
            f"{tile}/{warps}": peers(self.nccl, self.device, {"all_reduce.f16": self.kernel(number)})
            for number, (tile, warps) in enumerate(self.list["tiles"])
        }
        self.checked = {
            name: peers(
                self.nccl, self.device, {f"all_reduce.{'f16' if name == 'odd' else name}": self.kernel(count + number)}
            )
            for number, name in enumerate(self.list["checked"])
        }

    def graph_time(self, work: Callable[[], None]) -> float:
        """Microseconds of a captured call."""
        return self.time([work], rounds=9, repeat=REPEAT) * 1e3

    def times(self) -> dict[str, dict[str, float]]:
        """Microseconds by size and way; with launches that overlap, and one behind the other."""
        x, y = (self.torch.zeros(MOST // 2, dtype=self.torch.float16, device="cuda") for _ in range(2))
        source, target = x.data_ptr(), y.data_ptr()
        self.torch.cuda.synchronize()
        found: dict[str, dict[str, float]] = {}
        for size in SIZES:
            row = found.setdefault(str(size), {})
            given = source, target, size // 2, "f16"
            row["nccl"] = self.graph_time(partial(self.nccl.all_reduce, *given))
            for name, group in self.tiles.items():
                for overlap in (False, True):
                    self.device.overlap = overlap
                    way = f"{name} overlap" if overlap else name
                    row[way] = self.graph_time(partial(group.all_reduce, *given))
            self.device.overlap = False
        return found

    def check(self, replays: int) -> dict[str, Any]:
        """How many numbers differ from the sum in the order of ranks, over all replays of a graph of several sums."""
        torch, kinds = self.torch, {"f16": "float16", "odd": "float16", "f32": "float32", "bf16": "bfloat16"}
        cases = []
        for number, (name, count) in enumerate(SUMS):
            kind = getattr(torch, kinds[name])
            banks = [
                torch.randn(BANK, count, generator=torch.Generator().manual_seed(10 * rank + number)).to(kind).cuda()
                for rank in range(RANKS)
            ]
            total = torch.zeros(BANK, count, device="cuda")
            for bank in banks:
                total = total + bank.float()
            x, y = torch.empty(count, dtype=kind, device="cuda"), torch.empty(count, dtype=kind, device="cuda")
            cases.append((name, count, banks[self.rank], total.to(kind), x, y))
        wrong = torch.zeros(len(SUMS), dtype=torch.int64, device="cuda")
        torch.cuda.synchronize()

        def work() -> None:
            for name, count, _, _, x, y in cases:
                dtype = "f16" if name == "odd" else name
                self.checked[name].all_reduce(x.data_ptr(), y.data_ptr(), count, dtype)

        found: dict[str, Any] = {"replays": replays, "sums": SUMS}
        delays = random.Random(self.rank)
        for overlap in (False, True):
            self.device.overlap = overlap
            graph = self.device.capture(work)
            start = time.perf_counter()
            with torch.cuda.stream(torch.cuda.ExternalStream(int(self.device.stream))):
                for replay in range(replays // 2):
                    for _, _, bank, _, x, y in cases:
                        x.copy_(bank[replay % BANK])
                        y.fill_(7)
                    if delays.random() < 0.25:  # ranks are never in step
                        torch.cuda._sleep(delays.randrange(200_000))
                    self.device.replay(graph)
                    for number, (_, _, _, total, _, y) in enumerate(cases):
                        wrong[number] += (y != total[replay % BANK]).sum()
            self.device.wait()
            found["overlap" if overlap else "alone"] = {
                "wrong": wrong.tolist(), "seconds": time.perf_counter() - start,
            }  # fmt: skip
            self.device.drop(graph)
        self.device.overlap = False
        return found

    def ended(self) -> float:
        """Seconds until a rank that waits for another goes on, where it is told to give up after a fifth of one."""
        import numpy as np

        from runtime.cuda.peers import Peers

        group = self.checked["f16"]
        x = self.torch.zeros(4096, dtype=self.torch.float16, device="cuda")
        self.torch.cuda.synchronize()
        start = time.perf_counter()
        if self.rank == 0:  # the other never comes
            assert isinstance(group, Peers)
            for _ in range(3):
                group.all_reduce(x.data_ptr(), x.data_ptr(), 4096, "f16")
            Timer(0.2, lambda: self.device.write(group.stop, np.ones(1, np.int32))).start()
            self.device.wait()
        return time.perf_counter() - start


def run_rank(folder: Path, key: bytes, rank: int, replays: int, answers: Any) -> None:
    """All of one process."""
    one = Rank(folder, key, rank)
    found: dict[str, Any] = {"check": one.check(replays)}
    print(rank, json.dumps(found), flush=True)
    if replays >= 1000:  # not under a checker of memory, which lets a launch end before the host goes on
        found |= {"times": one.times(), "ended": one.ended()}
    answers.put((rank, found))


def run_all(folder: Path, out: Path, replays: int) -> None:
    """Both processes, and what they found."""
    import torch
    import torch.multiprocessing as processes

    from runtime.cuda.communicator import new_id

    context = processes.get_context("spawn")
    found: dict[str, Any] = {"gpus": [torch.cuda.get_device_name(rank) for rank in range(RANKS)],
                             "torch version": torch.__version__, "ranks": {}}  # fmt: skip
    answers, key = context.Queue(), new_id()
    started = [context.Process(target=run_rank, args=(folder, key, rank, replays, answers)) for rank in range(RANKS)]
    for process in started:
        process.start()
    left, last = RANKS, time.monotonic() + PATIENCE
    while left and time.monotonic() < last and all(process.exitcode in (None, 0) for process in started):
        try:
            rank, answer = answers.get(timeout=1)
        except queue.Empty:
            continue
        found["ranks"][str(rank)] = answer
        left -= 1
    if left:
        found["failed"] = [process.exitcode for process in started]
    for process in started:
        process.join(5)
        process.kill()
    out.write_text(json.dumps(found, indent=1))
    show(found)


def show(found: dict[str, Any]) -> None:
    """A table of the slower rank's microseconds."""
    ranks = found["ranks"].values()
    print({key: value for key, value in found.items() if key != "ranks"})
    print([(rank.get("check"), rank.get("ended")) for rank in ranks])
    for size in SIZES:
        row: dict[str, float] = {}
        for rank in ranks:
            for way, time_ in rank.get("times", {}).get(str(size), {}).items():
                row[way] = max(row.get(way, 0.0), time_)
        print(size, {way: round(time_, 2) for way, time_ in row.items()}, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    if sys.argv[1] == "compile":
        compile_all(Path(sys.argv[2]))
    else:
        run_all(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 10_000)
