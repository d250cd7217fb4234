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


def other_devices(bundle: str, needed: int, devices: Sequence[int]) -> SpecRTError:
    """GPUs that are not those that the bundle needs: none for one of the CPU."""
    runs = f"runs on {needed} different GPU{'s' if needed > 1 else ''}" if needed else "is compiled for the CPU"
    message = f"`devices` is {list(devices)}, `{bundle}` {runs}"
    hint = "leave `devices` out" if needed <= 1 else "leave `devices` out for the first ones"
    return SpecRTError("RUN-043", message, hint=hint)


def check_there(bundle: str, devices: Sequence[int], there: int) -> None:
    """Raises SpecRTError RUN-044 for a machine that has not the GPUs of a bundle of several."""
    if all(device < there for device in devices):
        return
    asked = f"GPU{'s' if len(devices) > 1 else ''} {', '.join(map(str, devices))}"
    message = f"`{bundle}` is to run on {asked}, this machine shows {there}"
    hint = "compile with fewer `--tensor-parallel` or `--pipeline-parallel`; CUDA_VISIBLE_DEVICES may hide some"
    raise SpecRTError("RUN-044", message, hint=hint)


def no_nccl(reason: str) -> SpecRTError:
    """A machine without the library that GPUs exchange values by."""
    hint = "`pip install specrt[nccl]`, or put the folder of libnccl.so.2 into LD_LIBRARY_PATH"
    return SpecRTError("RUN-045", f"several GPUs need NCCL, which can't be loaded: {reason}", hint=hint)


def nccl_failed(call: str, text: str, more: str) -> SpecRTError:
    """A call of NCCL that went wrong."""
    lines = [line.strip() for line in more.splitlines() if line.strip()]
    hint = "run again with NCCL_DEBUG=INFO; containers need /dev/shm of some hundred MB (`--shm-size=1g`)"
    return SpecRTError("RUN-046", f"NCCL's {call} says: {text}", notes=lines, hint=hint)


def rank_ended(rank: int, device: object, how: str) -> SpecRTError:
    """A process of a rank that is gone, or failed otherwise than by a mistake of the user."""
    hint = "what it printed before says more; load the bundle again: all its ranks have ended"
    return SpecRTError("RUN-047", f"rank {rank} on GPU {device} {how}", hint=hint)


def cut_off() -> SpecRTError:
    """Ranks that are no longer at the same step."""
    message = "the ranks were cut off in the middle of a step, by an error or an interrupt"
    return SpecRTError("RUN-048", message, hint="load the bundle again")


def usable(capability: int, compiled: Sequence[int]) -> int | None:
    """The architecture to take: machine code runs on GPUs of its major version with the same or a higher minor."""
    fitting = [number for number in compiled if number // 10 == capability // 10 and number <= capability]
    return max(fitting, default=None)
