"""Several GPUs on a real machine: how long NCCL takes between them, and whether ranks come and go as they should.

python bench/gpu_ranks.py exchange OUT.json [RANKS]         all_reduce and all_gather of 8 KB to 32 MB, in graphs
python bench/gpu_ranks.py lives BUNDLE OUT.json             of a bundle over several GPUs: ids, closing, a rank killed
python bench/gpu_ranks.py equal BUNDLE BUNDLE OUT.json      ids and logits of the first, on one GPU, and of the second
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gpu import where

SIZES = [8 << 10 << shift for shift in range(0, 13, 2)]  # bytes of what each rank gives
IN_GRAPH, REPLAYS = 32, 20
PROMPTS = (1, 7, 40, 130, 300)  # tokens
NEW = 32


def _exchange(rank: int, ranks: int, key: bytes) -> dict[str, Any]:
    """Microseconds of each collective and size on this rank, and whether sums are right and gathered rows in order."""
    from runtime.cuda.communicator import NCCL
    from runtime.cuda.driver import Device

    device = Device(rank)
    group = NCCL(device, key, rank, ranks)
    room = [device.allocate(max(SIZES) * ranks) for _ in range(2)]
    found: dict[str, Any] = {"all_reduce": {}, "all_gather": {}, "right": True}
    for size in SIZES:
        count = size // 2
        given = np.full(count, 0x3F80, np.uint16)  # 1 in bfloat16
        device.upload(room[0], given)
        device.wait()
        ways: dict[str, Callable[..., None]] = {"all_reduce": group.all_reduce, "all_gather": group.all_gather}
        for name, work in ways.items():

            def several(work: Callable[..., None] = work, count: int = count) -> None:
                for _ in range(IN_GRAPH):
                    work(room[0], room[1], count, "bf16")

            several()
            graph = device.capture(several)
            device.replay(graph)
            device.wait()
            start = device.event()
            for _ in range(REPLAYS):
                device.replay(graph)
            found[name][str(size)] = 1e3 * device.milliseconds(start, device.event()) / IN_GRAPH / REPLAYS
            start = device.event()
            for _ in range(REPLAYS):
                several()
            found[name][f"{size} launched"] = 1e3 * device.milliseconds(start, device.event()) / IN_GRAPH / REPLAYS
            got = np.zeros(count * (ranks if name == "all_gather" else 1), np.uint16)
            device.download(got, room[1])
            device.wait()
            wanted = 0x3F80 if name == "all_gather" else int(np.float32(ranks).view(np.uint32)) >> 16
            found["right"] = found["right"] and bool((got == wanted).all())
            device.drop(graph)
    device.drop_graphs()
    group.close()
    device.close()
    return found


def _of_rank(connection: Connection, rank: int, ranks: int, key: bytes) -> None:
    connection.send(_exchange(rank, ranks, key))


def exchange(out: Path, ranks: int) -> None:
    """Each rank in its process, as in the runtime."""
    from cuda.bindings import driver as cu

    from gpu_ranks import _of_rank  # by a name that another process finds it by
    from runtime.cuda.communicator import _Library, new_id
    from runtime.cuda.driver import check, count
    from runtime.cuda.workers import Workers, start

    here = where()
    key = new_id()
    peers = {
        f"{a}-{b}": int(check(cu.cuDeviceCanAccessPeer(a, b))) for a in range(ranks) for b in range(ranks) if a != b
    }
    workers = Workers([start(_of_rank, rank, ranks, key) for rank in range(1, ranks)], range(1, ranks))
    found = [_exchange(0, ranks, key), *workers.reports()]
    workers.close()
    workers.join()
    record = {**here, "gpus": count(), "ranks": ranks, "peers": peers, "nccl": _Library().version,
              "microseconds": {name: found[0][name] for name in ("all_reduce", "all_gather")},
              "right": all(one["right"] for one in found)}  # fmt: skip
    out.write_text(json.dumps(record, indent=1))
    print(json.dumps(record))


def _prompts(vocab: int, longest: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocab, min(count, longest)).tolist() for count in PROMPTS]


def _ids(model: Any, prompts: list[list[int]]) -> dict[str, Any]:
    return {
        "greedy": model.generate(prompts, max_new_tokens=NEW, stop=()),
        "drawn": model.generate(prompts, max_new_tokens=NEW, stop=(), temperature=0.8, top_k=20, seed=1),
        "beams": model.generate(prompts[1:3], max_new_tokens=NEW, stop=(), num_beams=3),
    }


def equal(one: Path, several: Path, out: Path) -> None:
    """What a bundle gives on one GPU and what its twin gives on several."""
    import runtime

    found: list[dict[str, Any]] = []
    logits = []
    for bundle in (one, several):
        with runtime.load(bundle, cache_tokens=4096) as model:
            longest = model.limits.max_sequence - NEW
            prompts = _prompts(model.vocab, longest)
            found.append(_ids(model, prompts))
            logits.append(model.logits(prompts))
    result: dict[str, Any] = {**where(), "bundles": [one.name, several.name]}
    for name in found[0]:
        result[name] = [a == b for a, b in zip(found[0][name], found[1][name], strict=True)]
    result["greatest logit"] = max(float(np.abs(a).max()) for a in logits[0])
    result["greatest difference"] = max(float(np.abs(a - b).max()) for a, b in zip(*logits, strict=True))
    out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


def lives(bundle: Path, out: Path) -> None:
    """Seconds to load and close, bytes that stay in use, and what is said where a rank is killed in a step."""
    import runtime
    from runtime.cuda.driver import Device
    from specs.errors import SpecRTError

    result: dict[str, Any] = {**where(), "bundle": bundle.name}
    devices = [
        Device(ordinal) for ordinal in range(json.loads((bundle / "bundle.json").read_text())["parallel"]["tensor"])
    ]
    used = []
    for number in range(3):
        start = time.perf_counter()
        model = runtime.load(bundle, cache_tokens=4096)
        loaded = time.perf_counter()
        prompts = _prompts(model.vocab, model.limits.max_sequence - NEW)
        model.generate(prompts, max_new_tokens=NEW, stop=())
        ran = time.perf_counter()
        model.close()
        result[f"seconds {number}"] = {"load": loaded - start, "run": ran - loaded, "close": time.perf_counter() - ran}
        used.append([_used(device) for device in devices])
    result["bytes in use after closing"] = used
    model = runtime.load(bundle, cache_tokens=4096)
    workers: Any = model.executable._workers  # type: ignore[attr-defined]
    threading.Timer(0.7, lambda: os.kill(workers._processes[0].pid, signal.SIGKILL)).start()
    start = time.perf_counter()
    try:
        while time.perf_counter() - start < 20:
            model.generate(prompts, max_new_tokens=NEW, stop=())
    except SpecRTError as error:
        result["killed"] = {"seconds": time.perf_counter() - start, "error": str(error)}
    start = time.perf_counter()
    model.close()
    result["killed"]["closing"] = time.perf_counter() - start
    result["bytes in use after a kill"] = [_used(device) for device in devices]
    out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))


def _used(device: Any) -> int:
    device.use()
    return int(device.used_memory)


COMMANDS: dict[str, Callable[..., None]] = {
    "exchange": lambda out, ranks="2": exchange(Path(out), int(ranks)),
    "lives": lambda bundle, out: lives(Path(bundle), Path(out)),
    "equal": lambda one, several, out: equal(Path(one), Path(several), Path(out)),
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
