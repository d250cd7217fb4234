"""What to say where a bundle has nothing for the GPU or the TensorRT at hand: both sides, and the command."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from specs.errors import SpecRTError, Where

FOLDER = "engines"


def tag(version: str, gpu: str) -> str:
    """The folder of the engines of one TensorRT and one GPU."""
    return "tensorrt-" + "-".join(re.sub(r"[^A-Za-z0-9.]", "_", part) for part in (version, gpu))


def unreadable(bundle: Path, path: Path, version: str) -> SpecRTError:
    """An engine that TensorRT does not take."""
    message = f"TensorRT {version} can't read `{path.name}`: its log says why"
    hint = f"build it again: `specrt build {bundle}`"
    return SpecRTError("BUNDLE-021", message, where=Where(str(path)), hint=hint)


def not_built(bundle: Path, wanted: str) -> SpecRTError:
    """No engines for this TensorRT and GPU."""
    folder = bundle / FOLDER
    there = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    has = f"has them for {', '.join(there)}" if there else "has none yet"
    message = f"the engines of this bundle are not built for {wanted}; it {has}"
    return SpecRTError("BUNDLE-020", message, where=Where(str(bundle)), hint=f"`specrt build {bundle}`: seconds")


def no_kernels(bundle: Path, capability: int, compiled: Sequence[int]) -> SpecRTError:
    """No kernels for this GPU."""
    names = ", ".join(f"sm{number}" for number in compiled)
    message = f"the kernels of this bundle are compiled for {names}; this GPU is sm{capability}"
    hint = f"`specrt compile SOURCE --target sm{capability} --out {bundle}`"
    return SpecRTError("BUNDLE-022", message, where=Where(str(bundle)), hint=hint)


def damaged_kernels(path: Path, reason: str) -> SpecRTError:
    """A kernels.json that says something else than it should."""
    hint = "compile the bundle again: `specrt compile SOURCE --out BUNDLE`"
    return SpecRTError("BUNDLE-024", f"kernels.json is damaged: {reason}", where=Where(str(path)), hint=hint)


def other_kernels(path: Path, found: object, read: int) -> SpecRTError:
    """Kernels that an earlier or later version compiled, which expect to be launched otherwise."""
    theirs = "of a version before formats had numbers" if found is None else f"of format {found}"
    hint = "compile the bundle again: `specrt compile SOURCE --out BUNDLE`"
    message = f"the kernels of this bundle are {theirs}; this runtime launches those of format {read}"
    return SpecRTError("BUNDLE-024", message, where=Where(str(path)), hint=hint)


def other_weights(path: Path, name: str) -> SpecRTError:
    """A weights file that is not the plan's."""
    message = f"`{path.name}` does not hold `{name}` as plan.json has it"
    hint = "compile the bundle again: `specrt compile SOURCE --out BUNDLE`"
    return SpecRTError("BUNDLE-023", message, where=Where(str(path)), hint=hint)


def cuda_failed(name: str, text: str) -> SpecRTError:
    """A call of the CUDA driver that went wrong."""
    hint = "the GPU may be in use by others, or its driver older than this CUDA needs: see `nvidia-smi`"
    return SpecRTError("RUN-041", f"CUDA says {name}: {text}", hint=hint)


def usable(capability: int, compiled: Sequence[int]) -> int | None:
    """The architecture to take: machine code runs on GPUs of its major version with the same or a higher minor."""
    fitting = [number for number in compiled if number // 10 == capability // 10 and number <= capability]
    return max(fitting, default=None)
