"""Compiles kernels ahead of time, to cubins that a runtime loads without Triton; needs no GPU.

Runs in processes of its own (`python -m compiler.kernels.build`, a job a line, answered by a line), as many as there
are processors: compiling takes half a second each, and kernels that this process has in Triton's interpreter can be
compiled nevertheless.
"""

from __future__ import annotations

import atexit
import base64
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiler.kernels.attention import Launch
from specs.errors import SpecRTError

# bytes of shared memory that a block may have (CUDA C++ Programming Guide, technical specifications)
SHARED = {
    70: 98304, 75: 65536, 80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448,
    110: 232448, 120: 101376, 121: 101376,
}  # fmt: skip
ARCHITECTURES = tuple(SHARED)
TYPES = {"f32": "*fp32", "f16": "*fp16", "bf16": "*bf16", "i32": "*i32", "i16": "*i16", "u8": "*u8", "i8": "*i8",
         "f8e4m3": "*fp8e4nv", "int": "i32"}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """A cubin and what is needed to launch it: the entry's name, threads in a block, dynamic shared memory."""

    launch: Launch
    architecture: int
    cubin: bytes
    entry: str
    threads: int
    shared: int
    overlap: bool  # it waits for the launches before it, and so may begin before they end

    @property
    def arguments(self) -> list[str]:
        """What is passed, in order; two null pointers follow, for scratch memory that these kernels do not use."""
        return [name for name, kind in self.launch.arguments if kind]

    def as_dict(self, file: str) -> dict[str, Any]:
        """Its part of kernels.json."""
        return {"file": file, "entry": self.entry, "threads": self.threads, "shared": self.shared,
                "overlap": self.overlap}  # fmt: skip


def build(
    launches: Sequence[Launch], architecture: int, done: Callable[[int, int], None] | None = None
) -> list[Compiled]:
    """Compile kernels for one GPU architecture (90 is sm_90); `done` hears how many of all there are.

    Raises SpecRTError LOWER-020 where Triton is missing.
    """
    if importlib.util.find_spec("triton") is None:
        hint = "`pip install specrt[gpu]`"
        raise SpecRTError("LOWER-020", "GPU kernels are compiled with Triton, which is not installed", hint=hint)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = (
        "1"  # Triton 3.9 warns where it is not said; products are sums of many terms
    )
    found: dict[int, Compiled] = {}
    # who is ready takes the next: some kernels take ten times as long as others
    waiting = iter([{"number": number, "launch": vars(launch), "architecture": architecture}
                    for number, launch in enumerate(launches)])  # fmt: skip

    def work(_: int) -> None:
        for made in _compiled(waiting, environment):
            number = made.pop("number")
            made["cubin"] = base64.b64decode(made["cubin"])
            found[number] = Compiled(launches[number], architecture, **made)
            if done is not None:
                done(len(found), len(launches))

    count = min(len(launches), len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(max(count, 1)) as threads:
        list(threads.map(work, range(count)))
    return [found[number] for number in range(len(launches))]


def _compiled(waiting: Iterator[dict[str, Any]], environment: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Answers of one process, which is given jobs until none is left."""
    command = [sys.executable, "-m", "compiler.kernels.build"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        for job in waiting:  # a list's iterator: safe between threads
            worker.stdin.write(json.dumps(job) + "\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
            if not answer:
                raise AssertionError("a kernel does not compile; the messages above say where")
            yield json.loads(answer)


def load(launch: Launch) -> Any:
    """The kernel as Triton has it: compiled, or interpreted where TRITON_INTERPRET says so."""
    module, name = launch.source.split(".")
    if not launch.text:
        return getattr(importlib.import_module(f"compiler.kernels.{module}"), name)
    # Triton reads a kernel's source from its file, later too: the folder stays until the process ends
    path = Path(tempfile.mkdtemp(prefix="specrt-kernel-")) / f"{module}.py"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    path.write_text(launch.text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"specrt_kernel_{path.parent.name}", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return getattr(made, name)


def _halts(ptx: str, label: str) -> bool:
    """Whether a barrier comes first behind a label, before memory is read or written."""
    _, _, text = ptx.partition(f"{label}:")
    first = re.search(r"\bbra\.uni\s+(\S+);|\b(bra|ret|ld(?!\.param)|st|red|atom)\b|\bbarrier\.sync\b", text)
    if first is None or first[2]:
        return False
    return first[1] is None or _halts(ptx, first[1])


def waits(ptx: str) -> bool:
    """Whether a kernel waits for the launches before it: as compiler/kernels/overlap.py says, or it is a mistake."""
    before, found, behind = ptx.partition("griddepcontrol.wait")
    for branch, label in re.findall(r"(\bbra\s+(\S+);)", before):
        if _halts(behind, label):  # warps with tasks of their own, until those that come here let them go
            before = before.replace(branch, "")
    if found and (early := re.search(r"\b(bra|ret|st|red|atom)\b", before)):
        raise AssertionError(f"`{early[0]}` stands before the wait: a path without it, or an early write")
    return bool(found)


def _room(resident: int, architecture: int) -> int:
    """Bytes of shared memory of which a multiprocessor has room for so many blocks, each with 1024 of the system's."""
    return ((SHARED[architecture] + 1024) // resident - 1024) // 128 * 128 if resident and architecture >= 80 else 0


def _compile(job: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from compiler.kernels.overlap import FIRST

    launch = Launch(**job["launch"])
    kernel = load(launch)
    arguments = dict(launch.arguments)
    constants = launch.constants | {name: None for name, kind in arguments.items() if not kind}
    constants |= {"overlap": job["architecture"] >= FIRST} if "overlap" in kernel.arg_names else {}
    signature = {name: TYPES.get(arguments.get(name, ""), "constexpr") for name in kernel.arg_names}
    # every pointer is aligned to 16 bytes: the arena's values are, and heads start at whole vectors
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") and name not in launch.unaligned
    }
    language = GluonASTSource if kernel.is_gluon() else triton.compiler.ASTSource
    source = language(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", job["architecture"], 32)
    for stages in range(launch.stages, 0, -1):  # fewer loads in flight where shared memory is small
        constants |= {"stages": stages} if "stages" in constants else {}
        options = {"num_warps": launch.warps, "num_stages": stages}
        made = triton.compile(source, target=target, options=options)
        if made.metadata.shared <= SHARED[job["architecture"]]:
            break
    else:
        raise AssertionError(f"{launch.name} wants {made.metadata.shared} bytes of shared memory")
    if made.metadata.global_scratch_size or made.metadata.profile_scratch_size:
        raise AssertionError(f"{launch.name} wants scratch memory, which its launch does not give")
    return {
        "number": job["number"], "cubin": base64.b64encode(made.asm["cubin"]).decode(), "entry": made.metadata.name,
        "threads": made.metadata.num_warps * 32,
        "shared": max(made.metadata.shared, _room(launch.resident, job["architecture"])),
        "overlap": waits(made.asm["ptx"]),
    }  # fmt: skip


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(_compile(json.loads(line))), flush=True)
    sys.stdout.flush()
    # all is done: what Triton's bindings do not give back when the process ends, they would report one by one
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
