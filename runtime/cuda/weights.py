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
from runtime.program import BYTES, StoredWeight

STAGE = 32 << 20  # bytes in each of two pinned buffers: one is filled from the file while the other is copied


def stored_bytes(weight: StoredWeight) -> int:
    """Bytes of a weight."""
    count = math.prod(weight.shape)
    return count * BYTES[weight.dtype]


def place_weights(weights: Mapping[str, StoredWeight]) -> tuple[dict[str, int], int]:
    """Offsets by name, one after the other, and the bytes of all."""
    offsets: dict[str, int] = {}
    total = 0
    for name, weight in weights.items():
        offsets[name] = total
        total += aligned(stored_bytes(weight))
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
                size = stored_bytes(weights[name])
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
    weights: Mapping[str, StoredWeight], offsets: Mapping[str, int], base: int, kernels: Mapping[str, Kernel]
) -> None:
    """Fill weights that no file holds: normal with deviation 0.02, the gains of norms around 1; equal in every run."""
    for name, weight in weights.items():
        if weight.file is None:
            mean = int(len(weight.shape) == 1 and name.endswith(".weight"))
            count = math.prod(weight.shape)
            kernel = kernels[f"random.{weight.dtype}.{mean}"]
            grid = (-(-count // kernel.constants["tile"]), 1, 1)
            seed = zlib.crc32(name.encode()) & 0x7FFFFFFF
            kernel.launch(grid, {"out": base + offsets[name], "count": count, "seed": seed})
