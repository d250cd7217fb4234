"""Builds the engines of a bundle where its GPU is, and keeps them: in the bundle, and in a cache that bundles share.

A plan depends on its segment, on the exact TensorRT, on the GPU and on what the builder is told, and on no weights. So
two checkpoints of one shape share it. Nothing is left behind by a build that fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiler.ir.core import Graph
from compiler.ir.parser import parse
from compiler.ir.types import Sym
from compiler.lower.tensorrt.build import LOG, build_segment, import_tensorrt
from compiler.lower.tensorrt.dialects import dialect, installed
from compiler.lower.tensorrt.options import BuildOptions, read_options
from compiler.lower.tensorrt.stored import stored_arrays
from specs.errors import SpecRTError, Where

FOLDER = "engines"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """An engine of a bundle: where it lies, its bytes, how long it took, and whether it was in the cache."""

    path: Path
    bytes: int
    seconds: float
    cached: bool

    def as_dict(self) -> dict[str, Any]:
        return {"file": str(self.path), "bytes": self.bytes, "seconds": self.seconds, "cached": self.cached}


def tag(version: str, gpu: str) -> str:
    """The folder of the engines of one TensorRT and one GPU (runtime/cuda/missing.py has the same)."""
    return "tensorrt-" + "-".join(re.sub(r"[^A-Za-z0-9.]", "_", part) for part in (version, gpu))


def cache_folder() -> Path:
    """Where plans and timings are kept: $SPECRT_CACHE, else specrt/ in the user's cache."""
    if given := os.environ.get("SPECRT_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specrt"


@dataclass(frozen=True)
class Device:
    """A GPU: its name, and its architecture (90 is sm_90)."""

    name: str
    architecture: int


def find_device() -> Device:
    """The first GPU, as its driver names it; raises SpecRTError LOWER-036 where there is none."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise _no_device("cuda-python is not installed", "`pip install specrt[tensorrt]`") from error
    try:
        code, *_ = driver.cuInit(0)
    except RuntimeError as error:  # cuda-bindings finds no driver's library
        raise _no_device(str(error), "install NVIDIA's driver, or build on a machine that has it") from error
    if int(code) == 0:
        code, device = driver.cuDeviceGet(0)
    if int(code) != 0:
        hint = "build on the machine that runs the bundle; `nvidia-smi` lists its GPUs"
        raise _no_device(f"CUDA says {code.name}", hint)
    _, name = driver.cuDeviceGetName(128, device)
    kinds = driver.CUdevice_attribute
    _, major = driver.cuDeviceGetAttribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    _, minor = driver.cuDeviceGetAttribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
    return Device(str(name.split(b"\0")[0].decode()), 10 * int(major) + int(minor))


def _no_device(reason: str, hint: str) -> SpecRTError:
    return SpecRTError("LOWER-036", f"no GPU to build for: {reason}", hint=hint)


def build_here(bundle: Path, architecture: int, progress: Progress | None = None) -> list[Plan]:
    """Build the engines if this machine has the bundle's TensorRT and a GPU of that architecture; else none."""
    version = installed()
    if version is None or dialect(version).toolchain != _options(bundle).toolchain:
        return []
    try:
        device = find_device()
    except SpecRTError as error:
        LOG.info("not built: %s", error.message)  # no GPU is no mistake here: the first run builds
        return []
    return build_bundle(bundle, gpu=device.name, progress=progress) if device.architecture == architecture else []


def _options(bundle: Path) -> BuildOptions:
    return read_options(json.loads((bundle / "plan.json").read_text(encoding="utf-8"))["build"])


def build_bundle(
    bundle: Path,
    *,
    trt: Any = None,
    gpu: str | None = None,
    progress: Progress | None = None,
) -> list[Plan]:
    """Build what is missing of a bundle's engines for this machine; `trt` and `gpu` stand in for them in tests.

    Raises SpecRTError LOWER-034 to LOWER-036, and LOWER-037 where the bundle was checked for another TensorRT.
    """
    plan = json.loads((bundle / "plan.json").read_text(encoding="utf-8"))
    files = list(dict.fromkeys(step["file"] for step in plan["steps"] if step["backend"] == "tensorrt"))
    if not files:
        return []
    trt = trt or import_tensorrt()
    gpu = gpu or find_device().name
    options = read_options(plan["build"])
    _check_version(bundle, options, trt.__version__)
    profiles = tuple(
        tuple(Sym(name, lo, opt, hi) for name, (lo, opt, hi) in ranges.items()) for ranges in plan["profiles"]
    )
    here = bundle / FOLDER / tag(trt.__version__, gpu)
    built = []
    for number, file in enumerate(files):
        if progress is not None:
            progress("engines", number, len(files))
        built.append(_plan(bundle, file, here, trt, gpu, profiles, options, plan))
    return built


def _check_version(bundle: Path, options: BuildOptions, version: str) -> None:
    if dialect(version).toolchain != options.toolchain:
        message = f"the bundle was compiled for {options.toolchain}, installed is TensorRT {version}"
        hint = f"compile it again: `specrt compile SOURCE --toolchain {dialect(version).toolchain} --out {bundle}`"
        raise SpecRTError("LOWER-037", message, where=Where(str(bundle / "plan.json")), hint=hint)


def _plan(
    bundle: Path,
    file: str,
    here: Path,
    trt: Any,
    gpu: str,
    profiles: tuple[tuple[Sym, ...], ...],
    options: BuildOptions,
    plan: Mapping[str, Any],
) -> Plan:
    target = here / f"{Path(file).stem}.plan"
    if _whole(target):
        return Plan(target, target.stat().st_size, 0.0, True)
    graph = parse((bundle / file).read_text(encoding="utf-8"))
    start = time.perf_counter()
    kept = cache_folder() / "plans" / f"{_key(Path(file).stem, graph, trt.__version__, gpu, profiles, options)}.plan"
    baked = options.weights == "baked"  # then the plan holds weights, and is nobody else's
    cached = not baked and _whole(kept)
    if cached:
        data = kept.read_bytes()
    else:
        timing = cache_folder() / "timing" / f"{tag(trt.__version__, gpu)}.cache"
        known = timing.read_bytes() if timing.is_file() else b""
        arrays = stored_arrays(bundle, plan["weights"]) if baked else None
        data, grown = build_segment(trt, graph, profiles, options, timing=known, baked=arrays)
        _write(timing, grown)
    seconds = time.perf_counter() - start
    note = {
        "sha256": hashlib.sha256(data).hexdigest(), "tensorrt": trt.__version__, "gpu": gpu,
        "seconds": round(seconds, 3),
    }  # fmt: skip
    for path in (target,) if baked or cached else (kept, target):
        _write(path, data)
        _write(path.with_suffix(".json"), (json.dumps(note) + "\n").encode())
    return Plan(target, len(data), seconds, cached)


def _key(
    digest: str, graph: Graph, version: str, gpu: str, profiles: tuple[tuple[Sym, ...], ...], options: BuildOptions
) -> str:
    # the digest knows no names, and an engine is bound by those of its ports: another model's may be called otherwise
    ports = [[value.name for value in graph.inputs], [port for port, _ in graph.outputs]]
    ranges = [[str(sym) for sym in dims] for dims in profiles]
    text = json.dumps([digest, ports, version, gpu, ranges, options.as_dict()])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _whole(path: Path) -> bool:
    """Whether a plan is there as it was written: the note comes last and has its hash."""
    note = path.with_suffix(".json")
    if not path.is_file() or not note.is_file():
        return False
    return bool(json.loads(note.read_text())["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest())


def _write(path: Path, data: bytes) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
