"""The bundle's kernels, loaded for this GPU: kernels.json says how each is launched."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.cuda.driver import Device
from runtime.cuda.missing import damaged_kernels, no_kernels, usable

FILE = "kernels/kernels.json"
_SCRATCH = (0, 0)  # two null pointers that Triton's kernels take last


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel; `arguments` are the names of what it takes, in order."""

    device: Device
    function: Any
    threads: int
    shared: int
    arguments: tuple[str, ...]
    constants: Mapping[str, Any]

    def launch(self, grid: Sequence[int], values: Mapping[str, int]) -> None:
        """Put it into the device's stream; values are addresses and whole numbers."""
        given = [values[name] for name in self.arguments]
        self.device.launch(self.function, grid, self.threads, self.shared, [*given, *_SCRATCH])


class Kernels:
    """`attention` by the index of a step; the others by name."""

    def __init__(self, folder: Path, device: Device) -> None:
        """Raises SpecRTError BUNDLE-022 where the bundle has no kernels for this GPU, BUNDLE-024 for a broken file."""
        path = folder / FILE
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            architecture = usable(device.capability, document["architectures"])
            if architecture is None:
                raise no_kernels(folder, device.capability, document["architectures"])
            loaded: dict[str, Kernel] = {}

            def kernel(entry: Mapping[str, Any]) -> Kernel:
                built = entry[f"sm{architecture}"]
                if built["file"] not in loaded:
                    function = device.function(folder / built["file"], built["entry"], built["shared"])
                    loaded[built["file"]] = Kernel(device, function, built["threads"], built["shared"],
                                                   tuple(entry["arguments"]), entry["constants"])  # fmt: skip
                return loaded[built["file"]]

            sets = [{name: kernel(entry) for name, entry in one.items()} for one in document["sets"]]
            self.attention = {int(step): sets[number] for step, number in document["attention"].items()}
            self.others = {name: kernel(entry) for name, entry in document["others"].items()}
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise damaged_kernels(path, repr(error)) from error
