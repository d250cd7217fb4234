"""Reads tensors of a bundle for engines that hold their weights: numpy arrays over mapped safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compiler.lower.tensorrt.emitter import Baked

_NUMPY = {
    "f32": "<f4", "f16": "<f2", "bf16": "<u2", "i64": "<i8", "i32": "<i4", "i8": "|i1", "u8": "|u1", "bool": "?",
    "f8e4m3": "|u1", "f8e8m0": "|u1", "i4": "|u1", "f4e2m1": "|u1",
}  # fmt: skip


def stored_arrays(bundle: Path, weights: Mapping[str, Mapping[str, Any]]) -> Baked:
    """A function from a weight's name to its array, mapped, in numpy's types or as bits (emitter.Baked)."""
    headers: dict[str, tuple[int, dict[str, Any]]] = {}

    def read(name: str) -> np.ndarray[Any, Any]:
        entry = weights[name]
        file = str(entry["file"])
        if file not in headers:
            with open(bundle / file, "rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                headers[file] = (8 + size, json.loads(stream.read(size)))
        start, header = headers[file]
        offset = start + header[name]["data_offsets"][0]
        return np.memmap(bundle / file, _NUMPY[entry["dtype"]], "r", offset, tuple(header[name]["shape"]))

    return read
