"""What to say where a bundle has nothing for the GPU or the TensorRT at hand: both sides, and the command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specs.errors import SpecRTError, Where


def not_built(bundle: Path, wanted: str) -> SpecRTError:
    """No engines for this TensorRT and GPU."""
    folder = bundle / "engines"
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


def usable(capability: int, compiled: Sequence[int]) -> int | None:
    """The architecture to take: machine code runs on GPUs of its major version with the same or a higher minor."""
    fitting = [number for number in compiled if number // 10 == capability // 10 and number <= capability]
    return max(fitting, default=None)
