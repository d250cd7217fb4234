"""Weights on the device: streamed from safetensors through pinned memory, or random, made where they are needed."""

from __future__ import annotations

import json
import math
import mmap
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from runtime.cuda.arena import aligned
from runtime.cuda.driver import Device
from runtime.cuda.kernels import Kernel
from runtime.cuda.missing import other_weights
from runtime.program import StoredWeight

STAGE = 32 << 20  # bytes in each of two pinned buffers: one is filled from the file while the other is copied


def place_weights(weights: Mapping[str, StoredWeight]) -> tuple[dict[str, int], int]:
    """Offsets by name, one after the other, and the bytes of all."""
    offsets: dict[str, int] = {}
    total = 0
    for name, weight in weights.items():
        offsets[name] = total
        total += aligned(weight.bytes)
    return offsets, total


def upload_weights(
    folder: Path, weights: Mapping[str, StoredWeight], offsets: Mapping[str, int], base: int, device: Device
) -> None:
    """Copy every stored weight to its place. Raises SpecRTError BUNDLE-023 where a file has not what the plan says."""
    files: dict[str, list[str]] = {}
    for name, weight in weights.items():
        if weight.file is not None:
            files.setdefault(weight.file, []).append(name)
    if not files:
        return
    stages = [device.pinned(STAGE) for _ in range(2)]
    busy: list[object] = [None, None]
    turn = 0
    for file, names in files.items():
        path = folder / file
        with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            length = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + length])
            view = np.frombuffer(content, np.uint8)
            for name in names:
                size = weights[name].bytes
                begin, end = header[name]["data_offsets"] if name in header else (0, -1)
                if end - begin != size:
                    raise other_weights(path, name)
                begin += 8 + length
                for at in range(0, size, STAGE):
                    count = min(STAGE, size - at)
                    if busy[turn] is not None:
                        device.passed(busy[turn])
                    stages[turn][:count] = view[begin + at : begin + at + count]
                    device.upload(base + offsets[name] + at, stages[turn], count)
                    busy[turn] = device.event()
                    turn = 1 - turn
            device.wait()
            del view  # a view holds the map open
    for event in busy:
        if event is not None:
            device.passed(event)


def random_weights(
    weights: Mapping[str, StoredWeight],
    offsets: Mapping[str, int],
    base: int,
    kernels: Mapping[str, Kernel],
    device: Device,
) -> None:
    """Make weights that no file holds: normal numbers, random codes, scales that are all alike; equal in every run."""
    for name, weight in weights.items():
        if weight.file is not None:
            continue
        address, how = base + offsets[name], weight.random
        if "bits" in how:
            device.fill(address, how["bits"], how["bytes"], weight.bytes // how["bytes"])
            continue
        if "normal" in how:
            kernel, count = kernels[f"normal.{weight.dtype}.{how['normal']}"], math.prod(weight.shape)
        else:
            keep, add = how["codes"]
            kernel, count = kernels[f"codes.{keep}.{add}"], -(-weight.bytes // 4)
        grid = (-(-count // kernel.constants["tile"]), 1, 1)
        seed = zlib.crc32(name.encode()) & 0x7FFFFFFF
        kernel.launch(grid, {"out": address, "count": count, "seed": seed})
