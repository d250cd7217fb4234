"""Writes the bundle of a GPU: segments as text, weights, kernels as machine code, the plan. Needs no GPU."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.ir.core import Equation, Graph, walk
from compiler.ir.types import Sym
from compiler.lower.capability import Emit, Judge, Verdict, check
from compiler.lower.layouts import stored_type
from compiler.lower.low_bit import KernelSteps, low_bit_experts
from compiler.lower.norm_steps import is_norm
from compiler.lower.pipeline import stages_of
from compiler.lower.plan import Plan, StoredWeight, cache_of
from compiler.lower.random_weights import random_weights
from compiler.lower.ranks import check_alike, plan_file, write_ranks
from compiler.lower.stored_weights import decided_by_weights
from compiler.lower.tensorrt.capabilities import verdict
from compiler.lower.tensorrt.cut import Cut, cut
from compiler.lower.tensorrt.dialects import dialect
from compiler.lower.tensorrt.native import check_products, native_profiles
from compiler.lower.tensorrt.network import profiles
from compiler.lower.tensorrt.options import BuildOptions, for_base
from compiler.passes.insert_kv_cache import METADATA
from specs.errors import SpecRTError
from specs.hardware import load_toolchain

if TYPE_CHECKING:
    import torch

    Weights = Callable[[str], torch.Tensor]
Progress = Callable[[str, int, int], None]
_LOG = logging.getLogger("compiler.lower")


STEP_TOKENS = 8192  # most tokens in a call: scratch memory grows with them, and products gain nothing beyond 2048
PACKED = frozenset({"tokens", "positions", "rows", "select", *(value.name for value in METADATA)})  # of every sequence
KERNEL = Emit("not in an engine: a product of low-bit operands, which a kernel of ours computes")
ALONE = Emit("not in an engine: every segment is a program of kernels of ours")
ROWS = Emit("not in an engine: on whole rows a kernel of ours computes it, between two")
STORED = Emit("not in an engine: stored, or computed from weights before it is stored")
FULL_TOKENS = 2048  # what engines for many tokens are tuned for, and what the runtime takes at once


def bounded(graph: Graph) -> Graph:
    """The graph with at most STEP_TOKENS tokens and rows of logits in a call; its limits alone may allow far more.

    A prompt with inputs of its own is never cut: one of full length must fit beside a step.
    """
    sizes = {sym.name: sym.hi for sym in graph.dims}
    most = STEP_TOKENS
    if {value.name for value in graph.inputs} - PACKED and "B" in sizes:
        most = max(most, sizes["T"] // sizes["B"] + FULL_TOKENS if "T" in sizes else sizes["S"])
    tokens = ("T", "S") if "N" in sizes else ("T",)  # S of a decoder; an encoder takes its rows whole
    return replace(graph, dims=tuple(_bounded(sym, most, tokens) for sym in graph.dims))


def _bounded(sym: Sym, most: int, tokens: tuple[str, ...]) -> Sym:
    if sym.name not in (*tokens, "N"):
        return sym
    high = min(sym.hi, most)
    best = max(sym.opt, FULL_TOKENS) if sym.name in tokens else sym.opt
    return Sym(sym.name, sym.lo, min(best, high), high)


def kernel_steps(options: BuildOptions, architecture: int) -> KernelSteps:
    """Which low-bit products no engine of the toolchain has."""
    line = dialect(options.toolchain)
    return KernelSteps(
        options.toolchain, architecture, lambda equation: verdict(equation, line), options.weights == "baked",
        options.alone,
    )  # fmt: skip


def settled(asked: BuildOptions, graph: Graph, base: str, how: str | None, architecture: int) -> BuildOptions:
    """Options that say engines or kernels: as asked, else kernels where the toolchain's file prefers them for the base.

    Engines remain where they multiply codes (`how` is native), where they hold their weights, and for a model that
    kernels do not know as a whole.
    """
    options = for_base(asked, base)
    if options.segments is not None:
        return options
    engines = replace(options, segments="engines")
    preferred = load_toolchain(options.toolchain).preferred(base, architecture)
    if options.weights == "baked" or how == "native" or preferred is None:
        return engines
    alone = replace(options, segments="kernels")
    try:
        cut(bounded(graph), kernels=kernel_steps(alone, architecture))
    except SpecRTError as error:
        if error.code != "LOWER-039":
            raise
        _LOG.info("%s has engines: %s", graph.name, error.message)
        return engines
    return alone


def judge_of(graph: Graph, options: BuildOptions, architecture: int) -> Judge:
    """The verdict on each equation of a graph: the toolchain's, or why none of its engines has it."""
    line = dialect(options.toolchain)
    known: dict[str, Equation] = {}
    others: list[Equation] = []
    kernels = kernel_steps(options, architecture)
    taken = kernels.of(walk(graph.equations))
    own = {value.name for product in taken for equation in product.equations for value in equation.results}
    own |= {weight.result.name for _, weight in low_bit_experts(walk(graph.equations))}
    for equation in walk(graph.equations):
        if equation.op in ("weight", "const") or decided_by_weights(equation, known):
            known[equation.results[0].name] = equation
        elif equation.results[0].name not in own:
            others.append(equation)
    read = {value.name for equation in others for value in equation.values}

    def judge(equation: Equation) -> Verdict:
        name = equation.results[0].name
        if kernels.alone:
            return ALONE
        if name in own:
            return KERNEL
        if kernels.norms and is_norm(equation):
            return ROWS
        if name in known and name not in read:
            return STORED
        if name in known and equation.op != "const":
            equation = replace(equation, op="weight")  # what engines get of it
        return verdict(equation, line)

    return judge


def plan_of(graph: Graph, options: BuildOptions, architecture: int, pipeline: int = 1) -> tuple[Cut, Plan]:
    """The pieces of a graph and their plan in so many stages, weights not yet in files.

    Raises SpecRTError LOWER-001, LOWER-038, LOWER-039, LOWER-041.
    """
    graph = bounded(graph)
    check(graph, judge_of(graph, options, architecture), options.toolchain)
    kernels = kernel_steps(options, architecture)
    if options.native:
        check_products(kernels.of(walk(graph.equations)), options.toolchain)
    cache = cache_of(graph)
    pieces = cut(graph, baked=options.weights == "baked", kernels=kernels)
    random = random_weights(pieces.graph)
    weights = {
        name: StoredWeight(tensor.type, None, stored_type(tensor).bytes, tensor.layout, random[name])
        for name, tensor in pieces.tensors.items()
    }
    linear = cache is not None and cache.kind == "linear"
    plan = Plan(
        graph.dims, graph.inputs, pieces.steps, pieces.graph.outputs, cache, pieces.values, weights,
        native_profiles(graph.dims) if linear else profiles(graph.dims), options.as_dict(),
    )  # fmt: skip
    return pieces, replace(plan, stages=stages_of(plan, pipeline))


def write(
    graphs: Sequence[Graph],
    weights: Weights | None,
    out: Path,
    options: BuildOptions,
    architecture: int,
    pipeline: int = 1,
    progress: Progress | None = None,
) -> tuple[Plan, dict[str, str]]:
    """Write everything into `out`; gives the plan of the first rank and the toolchain that the bundle is for.

    Ranks that share each product have a graph each, which is cut in the same way.
    Without `weights` none are written: the runtime makes random ones on the device. `architecture` 90 is sm_90.
    Raises SpecRTError LOWER-001 for what the toolchain can't run, LOWER-020 without Triton; OSError for a full disk.
    """
    each = [plan_of(graph, options, architecture, pipeline) for graph in graphs]
    plans = [plan for _, plan in each]
    check_alike(plans)
    if weights is not None:
        stored = write_ranks([list(pieces.tensors.values()) for pieces, _ in each], weights, out, progress)
        plans = [replace(plan, weights=found) for plan, found in zip(plans, stored, strict=True)]
    pieces, plan = each[0][0], plans[0]
    (out / "segments").mkdir(parents=True, exist_ok=True)
    for segment in pieces.segments.values():
        (out / segment.file).write_text(str(segment.graph), encoding="utf-8")
    served = options.native and plan.cache is not None  # tokens are chosen next to the logits there too
    if any(step.kind != "engine" for step in plan.steps) or served or weights is None:
        from compiler.kernels.library import write_kernels

        def done(compiled: int, number: int) -> None:
            if progress is not None:
                progress("kernels", compiled, number)

        done(0, 1)
        write_kernels(json.loads(json.dumps(plan.as_dict())), out, (architecture,), done)
    for rank, own in enumerate(plans):
        own.write(out / plan_file(rank))
    return plan, {"tensorrt": dialect(options.toolchain).version}
