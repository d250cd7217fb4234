"""Builds the engine of one segment with the real TensorRT: what the builder is told, and why it failed.

Needs TensorRT, numpy and the IR: no PyTorch, so that bundles can be built where they run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from compiler.ir.core import Graph, walk
from compiler.ir.types import Sym
from compiler.lower.tensorrt.dialects import Dialect, dialect
from compiler.lower.tensorrt.emitter import Baked, Emitter
from compiler.lower.tensorrt.network import add_profiles, create_network, emit
from compiler.lower.tensorrt.options import HARDWARE, BuildOptions
from specs.errors import SpecRTError, Where

# 8.6's word for a cache that it wrote itself and can't read: seen on an H200 once processes had built side by side.
# What it then gives as the grown cache can't be read either, so that every later build would time everything again.
UNUSABLE = "timing cache will not be used"
LOG = logging.getLogger("compiler.tensorrt")


def import_tensorrt() -> Any:
    """The module; raises SpecRTError LOWER-034 where it is not installed or does not load."""
    try:
        import tensorrt
    except ImportError as error:
        hint = "`pip install specrt[tensorrt]` on a machine with an NVIDIA GPU; everything but building works without"
        raise SpecRTError("LOWER-034", f"TensorRT can't be imported: {error}", hint=hint) from error
    return tensorrt


def make_logger(trt: Any) -> Any:
    """TensorRT's log as ours; `errors` collects what went wrong."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            level = {"INTERNAL_ERROR": 40, "ERROR": 40, "WARNING": 30, "INFO": 20}.get(str(severity).split(".")[-1], 10)
            if level >= logging.ERROR:
                self.errors.append(text)
            LOG.log(min(level, logging.WARNING), "%s", text)  # an error is raised as one, once

    return Logger()


def build_segment(
    trt: Any,
    graph: Graph,
    profiles: Sequence[Sequence[Sym]],
    options: BuildOptions,
    *,
    timing: bytes = b"",
    baked: Baked | None = None,
) -> tuple[bytes, bytes]:
    """The serialized engine of a segment, and the timing cache grown by it, as far as TensorRT can read it again.

    Raises SpecRTError LOWER-035 with TensorRT's reason, and the line of the spec where a layer of it is named.
    """
    line = dialect(trt.__version__)
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    network = create_network(trt, builder, line)
    emitter = emit(trt, graph, network, line, baked, native=options.native)
    config = builder.create_builder_config()
    configure(trt, config, graph, line, options)
    _use_timings(config, timing)
    add_profiles(builder, config, graph, profiles)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _failed(trt, logger.errors, emitter)
    if any(UNUSABLE in text for text in logger.errors):
        LOG.warning("TensorRT can't read its timing cache and did not use it; the next build starts a new one")
        return bytes(plan), b""
    grown = config.get_timing_cache()
    found = b"" if grown is None else bytes(grown.serialize())
    said = len(logger.errors)
    if config.create_timing_cache(found) is None or len(logger.errors) != said:
        LOG.info("TensorRT can't read the timing cache that it wrote; the one of before stays")
        return bytes(plan), timing
    return bytes(plan), found


def _use_timings(config: Any, known: bytes) -> None:
    """Give the builder the timings of earlier builds; none where they are of another TensorRT or GPU."""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, False):
        LOG.warning("the timing cache is of another TensorRT or GPU; a new one is started")
        config.set_timing_cache(config.create_timing_cache(b""), False)


def configure(trt: Any, config: Any, graph: Graph, line: Dialect, options: BuildOptions) -> None:
    """Tell the builder: types are obeyed, float32 is float32 unless TF32 is asked for, and the deployment's options."""
    flags = trt.BuilderFlag
    if options.tf32:
        config.set_flag(flags.TF32)
    else:  # it is set by default, and 10 bits of fraction are not float32
        config.clear_flag(flags.TF32)
    if not line.strong:
        config.set_flag(flags.OBEY_PRECISION_CONSTRAINTS)
        types = {value.type.dtype for equation in walk(graph.equations) for value in equation.results}
        if "f16" in types | {value.type.dtype for value in graph.inputs}:
            config.set_flag(flags.FP16)
        if "i8" in types | {value.type.dtype for value in graph.inputs}:
            config.set_flag(flags.INT8)
        # contexts of one engine may then share a profile, as from 10.0 on always: one for each captured graph
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
        # not cuBLAS, cuBLASLt and cuDNN: their own libraries may be absent, and TensorRT's kernels did as well
        own = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
        config.set_tactic_sources(sum(1 << int(source) for source in own))
    config.builder_optimization_level = options.level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.hardware != "this":
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, HARDWARE[options.hardware])
    if options.version_compatible:
        config.set_flag(flags.VERSION_COMPATIBLE)
    if options.weight_streaming:
        config.set_flag(flags.WEIGHT_STREAMING)


def _failed(trt: Any, errors: Sequence[str], emitter: Emitter) -> SpecRTError:
    reason = errors[-1] if errors else "it gives no reason"
    where: Where | None = None
    # the longest name first: `mlp.up/cast @ ...` holds none of the others, but `up @ ...` may be part of one
    for text in errors[::-1]:
        named = [name for name in emitter.places if name in text]
        if named:
            where = emitter.places[max(named, key=len)]
            break
    notes = [f"before that: {text}" for text in errors[:-1]]
    return SpecRTError(
        "LOWER-035", f"TensorRT {trt.__version__} can't build an engine: {reason}", where=where, notes=notes
    )
