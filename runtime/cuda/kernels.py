"""The bundle's kernels, loaded for this GPU: kernels.json says how each is launched."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.cuda.driver import Device
from runtime.cuda.missing import damaged_kernels, no_kernels, other_kernels, usable
from runtime.cuda.programs import RowCall, RowProgram

FILE = "kernels/kernels.json"
FORMAT = 2  # of the file and of what its kernels expect: rises with either, in compiler/kernels/library.py too
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
    overlap: bool  # it waits for the launches before it, and so may begin before they end

    def launch(self, grid: Sequence[int], values: Mapping[str, int]) -> None:
        """Put it into the device's stream; values are addresses and whole numbers."""
        given = [values[name] for name in self.arguments]
        self.device.launch(self.function, grid, self.threads, self.shared, [*given, *_SCRATCH], self.overlap)

    def resident(self) -> int:
        """How many of its blocks the GPU holds at once."""
        return self.device.resident(self.function, self.threads, self.shared)


def _program(entry: Mapping[str, Any], loaded: Mapping[str, Kernel]) -> RowProgram:
    calls = (
        RowCall(loaded[c["kernel"]], tuple(c["rows"]), c["blocks"], c["tile"], c["places"], c["depth"])
        for c in entry["calls"]
    )
    return RowProgram(tuple(calls), entry["temps"])


class Kernels:
    """`attention` by the index of a step, `programs` by segment and rows, `others` by name."""

    def __init__(self, folder: Path, device: Device, needed: bool) -> None:
        """Raises SpecRTError BUNDLE-022 where the bundle has no kernels for this GPU, BUNDLE-024 for another format.

        Where they are not `needed`, as in a plan of engines alone, there may be none.
        """
        path = folder / FILE
        self.attention: dict[int, dict[str, Kernel]] = {}
        self.others: dict[str, Kernel] = {}
        self.programs: dict[str, dict[int, RowProgram]] = {}
        if not path.is_file():
            if needed:
                raise damaged_kernels(path, "it is missing")
            return
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.get("format") != FORMAT:
                raise other_kernels(path, document.get("format"), FORMAT)
            architecture = usable(device.capability, document["architectures"])
            if architecture is None:
                raise no_kernels(folder, device.capability, document["architectures"])
            loaded: dict[str, Kernel] = {}
            for key, entry in document["kernels"].items():
                if f"sm{architecture}" not in entry:
                    continue  # tiles of another architecture
                built = entry[f"sm{architecture}"]
                function = device.function(folder / built["file"], built["entry"], built["shared"])
                loaded[key] = Kernel(device, function, built["threads"], built["shared"], tuple(entry["arguments"]),
                                     entry["constants"], built["overlap"])  # fmt: skip
            sets = [{name: loaded[key] for name, key in one.items()} for one in document["sets"][f"sm{architecture}"]]
            self.attention = {int(step): sets[number] for step, number in document["attention"].items()}
            self.others = {name: loaded[key] for name, key in document["others"].items()}
            self.programs = {
                file: {int(size): _program(program, loaded) for size, program in sizes.items()}
                for file, sizes in document["programs"][f"sm{architecture}"].items()
            }
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise damaged_kernels(path, repr(error)) from error
