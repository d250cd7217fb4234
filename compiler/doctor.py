"""What this machine has that matters to SpecRT; nothing heavy is imported and nothing is changed."""

from __future__ import annotations

import ctypes.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import specs

PACKAGES = ("torch", "openvino", "numpy", "tokenizers", "safetensors", "pydantic")
# /proc/cpuinfo's flag: what it is good for here
CPU_FEATURES = {
    "avx2": "vector arithmetic, 8 floats",
    "avx512f": "vector arithmetic, 16 floats",
    "avx512_vnni": "int8 products",
    "avx512_bf16": "bf16 products",
    "amx_bf16": "bf16 matrix tiles",
    "amx_int8": "int8 matrix tiles",
}
_UNLIMITED = 1 << 60  # cgroup v1 writes a huge number for "no limit"


@dataclass(frozen=True)
class Cpu:
    """The processor: `cores` are those that this process may use."""

    name: str
    cores: int
    features: dict[str, bool] | None  # None where the system does not tell (not Linux)


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as the driver names it."""

    name: str
    memory: str
    driver: str
    compute: str


@dataclass(frozen=True)
class Machine:
    """Everything that `doctor` reports about a machine."""

    specrt: str
    python: str
    system: str
    packages: dict[str, str | None]
    cpu: Cpu
    memory_bytes: int | None
    memory_limit_bytes: int | None  # of the container, where there is one
    gpus: tuple[Gpu, ...]
    gpu_note: str | None  # why there are none
    tensorrt: str | None
    nccl: str | None  # what several GPUs exchange values by: the version of its package, or the system's library

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "gpus": [asdict(gpu) for gpu in self.gpus]}


def examine() -> Machine:
    """Look at this machine."""
    gpus, note = _gpus()
    return Machine(
        specrt=specs.__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages={name: version(name) for name in PACKAGES},
        cpu=_cpu(),
        memory_bytes=_memory(),
        memory_limit_bytes=_memory_limit(),
        gpus=gpus,
        gpu_note=note,
        tensorrt=version("tensorrt"),
        nccl=version("nvidia-nccl-cu13") or version("nvidia-nccl-cu12") or ctypes.util.find_library("nccl"),
    )


def version(package: str) -> str | None:
    """The installed version of a distribution, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def missing_packages(machine: Machine) -> list[str]:
    """Packages without which nothing can be compiled or run."""
    return [name for name, found in machine.packages.items() if found is None]


def _cpu() -> Cpu:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return Cpu(platform.processor() or platform.machine(), cores, None)
    text = path.read_text(encoding="utf-8", errors="replace")
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.M)
    if flags is None:
        return Cpu(name[1] if name else platform.machine(), cores, None)
    present = set(flags[1].split())
    return Cpu(name[1] if name else platform.machine(), cores, {flag: flag in present for flag in CPU_FEATURES})


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _memory_limit() -> int | None:
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        if path.is_file():
            text = path.read_text(encoding="utf-8").strip()
            return int(text) if text.isdecimal() and int(text) < _UNLIMITED else None
    return None


def _gpus() -> tuple[tuple[Gpu, ...], str | None]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return (), "no NVIDIA driver (`nvidia-smi` is not here)"
    query = [tool, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), f"`nvidia-smi` does not run: {error}"
    if done.returncode != 0:
        return (), f"`nvidia-smi` says: {(done.stderr or done.stdout).strip().splitlines()[:1]}"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.count(",") == 3]
    return tuple(Gpu(*row) for row in rows), None if rows else "the driver sees no GPU"
