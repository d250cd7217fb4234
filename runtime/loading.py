"""From a bundle to the model that a user holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runtime.bundle import Bundle
from runtime.cuda.missing import other_devices
from runtime.executable import PACKED, Executable
from runtime.model import Model
from specs.errors import SpecRTError

GPU_STEP_TOKENS = 2048  # in one call on a GPU: its products reach their full rate there (docs/decisions.md)


def load(
    path: str | Path,
    *,
    cache_tokens: int | None = None,
    threads: int | None = None,
    step_tokens: int | None = None,
    verify: bool = True,
    devices: Sequence[int] | None = None,
) -> Model:
    """Load a bundle: check its files (hashes too, unless `verify` is off), compile its engines, allocate the KV cache.

    `cache_tokens` is the size of the cache, by default what the limits can use and at most half of the free memory
    (nearly all of a GPU's); `threads` the CPU threads, by default all cores; `step_tokens` the most tokens in one call;
    `devices` the GPUs, one for each rank of the bundle, by default the first ones.
    Raises SpecRTError BUNDLE-001 to BUNDLE-009, RUN-011 to RUN-013, RUN-016, RUN-043; for a GPU bundle also BUNDLE-020
    to BUNDLE-024, RUN-040 to RUN-048.
    """
    bundle = Bundle.open(path, verify=verify)
    if any((step.kind, step.backend) in (("engine", "tensorrt"), ("program", "cuda")) for step in bundle.program.steps):
        return _on_gpu(bundle, cache_tokens, step_tokens, devices)
    if devices is not None:
        raise other_devices(bundle.name, 0, devices)
    from runtime.openvino_executable import OpenVINOExecutable

    return Model(
        bundle, OpenVINOExecutable(bundle, cache_tokens=cache_tokens, threads=threads), step_tokens=step_tokens
    )


def _on_gpu(bundle: Bundle, cache_tokens: int | None, step_tokens: int | None, devices: Sequence[int] | None) -> Model:
    # prompts with inputs of their own are never cut: a step may take its tokens and one such prompt (runtime/engine.py)
    own = {port.name for port in bundle.program.inputs} - set(PACKED)
    longest = bundle.limits.max_sequence if own else 0
    dims, cache = bundle.program.dims, bundle.program.cache
    linear = cache is not None and cache.kind == "linear"
    # over a linear cache each prompt is a call of its own, and so are the sequences that decode
    most = dims["S"][2] if linear else dims["T"][2] - longest if "T" in dims else None
    if step_tokens is not None and most is not None and step_tokens > most:
        message = f"`step_tokens` is {step_tokens}, the engines of `{bundle.name}` take {most}"
        raise SpecRTError("RUN-013", message)
    # stages work on the pieces of a prompt one behind the other: there must be some
    tokens = step_tokens or max(GPU_STEP_TOKENS // bundle.pipeline, bundle.limits.max_batch)
    tokens = tokens if most is None else min(tokens, most)
    needed = bundle.tensor * bundle.pipeline
    chosen = tuple(range(needed) if devices is None else devices)
    if len(chosen) != needed or len(set(chosen)) != needed or min(chosen) < 0:
        raise other_devices(bundle.name, needed, chosen)
    try:
        from runtime.cuda.executable import CUDAExecutable
        from runtime.cuda.pipeline import Pipeline
        from runtime.cuda.ranks import RankedExecutable

        executable: Executable
        if linear:
            from runtime.cuda.native import NativeExecutable

            tokens = max(tokens, bundle.limits.max_batch)
            executable = NativeExecutable(
                bundle, tokens=max(tokens, longest), cache_tokens=cache_tokens, device=chosen[0]
            )
        elif len(chosen) == 1:
            executable = CUDAExecutable(bundle, tokens=tokens + longest, cache_tokens=cache_tokens, device=chosen[0])
        elif bundle.tensor == 1:
            executable = Pipeline(bundle, devices=chosen, tokens=tokens + longest, cache_tokens=cache_tokens)
        else:
            executable = RankedExecutable(bundle, tokens=tokens + longest, cache_tokens=cache_tokens, devices=chosen)
    except ImportError as error:
        hint = "`pip install specrt[tensorrt]` on a machine with an NVIDIA GPU, or compile with `--target cpu`"
        raise SpecRTError(
            "RUN-042", f"`{bundle.name}` is compiled for a GPU, and `{error.name}` is not installed", hint=hint
        ) from error
    return Model(bundle, executable, step_tokens=tokens if bundle.role == "decoder" else None)
