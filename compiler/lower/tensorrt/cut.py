"""Cuts a finished graph for a GPU: engine segments, attention and exchanges between them, and tensors to store.

A segment with a product that the toolchain leaves to kernels is a program of kernels as a whole, or, where it has
something that those do not know, is cut again: each such product is a program, what is between them engines. So are
experts, and norms where the toolchain says so. Without engines every segment is a program, or the graph is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from compiler.ir.core import Graph, Value
from compiler.ir.formats import HALF_BYTES
from compiler.lower.attention_step import BACKEND, AttentionStep, attention_steps
from compiler.lower.exchange_step import EXCHANGES, exchange_step
from compiler.lower.expert_steps import expert_owners
from compiler.lower.layouts import PAIRS
from compiler.lower.low_bit import KernelSteps, LowBitProduct, kernel_layouts, with_row_scales
from compiler.lower.norm_steps import norm_owners, rows_only
from compiler.lower.partition import Segment, partition
from compiler.lower.plan import ROWS, Step
from compiler.lower.segments import EngineSegment, engine_segment
from compiler.lower.stored_weights import Tensor, store
from compiler.passes.unroll import unroll
from specs.errors import SpecRTError

NAME = "tensorrt"
PROGRAM = "program"  # a segment as kernels
Refusals = dict[str, "str | None"]  # why segments can't be kernels, by digest


@dataclass(frozen=True)
class Cut:
    """A graph in pieces: `steps` in order, a segment for each digest, what is stored, and all values between steps."""

    graph: Graph  # without `repeat`, its weights as they are stored
    steps: tuple[Step, ...]
    segments: Mapping[str, EngineSegment]
    tensors: Mapping[str, Tensor]
    values: tuple[Value, ...]


def cut(graph: Graph, *, baked: bool = False, kernels: KernelSteps | None = None) -> Cut:
    """The pieces of a graph after its passes; `baked` keeps weights inside of segments, which then differ by layer.

    `kernels` says which low-bit products are no engine's; raises SpecRTError LOWER-039 where no kernel takes one.
    """
    whole = unroll(graph)
    whole, tensors = store(whole if kernels is None else with_row_scales(whole))
    attention = attention_steps(whole)
    owner = {
        equation.results[0].name: name
        for name, kernel in attention.items()
        for equation in (kernel.equation, *kernel.absorbed)
    }
    exchanges = {eq.result.name: eq for eq in whole.equations if eq.op in EXCHANGES}
    owner |= {name: name for name in exchanges}
    stored = {eq.result.name: str(eq.attr["name"]) for eq in whole.equations if eq.op == "weight"}
    states = {eq.result.name: str(eq.attr["name"]) for eq in whole.equations if eq.op == "state"}
    # one GPU has the head of a low-bit decoder in a program, behind the last layer's products: so have several
    shared = bool(exchanges) and kernels is not None and not baked and bool(kernels.of(whole.equations))
    steps: list[Step] = []
    segments: dict[str, EngineSegment] = {}
    refusals: Refusals = {}
    for part in partition(whole, lambda equation: owner.get(equation.results[0].name)):
        if part.kind == "step" and part.graph.equations[-1].op in EXCHANGES:
            steps.append(exchange_step(part.graph.equations[-1]))
            continue
        if part.kind == "step":
            steps.append(_kernel(part.graph, attention).step(stored, states))
            continue
        for kind, segment in _pieces(part, kernels, baked, refusals):
            if shared and kernels is not None and _refusal(segment, kernels, refusals) is None:
                kind = PROGRAM
            step = _engine_step(segment, segments.setdefault(segment.digest, segment))
            steps.append(replace(step, backend=BACKEND, kind=PROGRAM) if kind == PROGRAM else step)
    order = {name: index for index, name in enumerate(_weights_in_order(steps))}
    if baked:
        order = {name: index for index, name in enumerate(tensors)}
    layouts = _layouts(steps, segments, kernels)
    used = {
        name: replace(tensors[name], layout=layouts.get(name, ROWS)) for name in sorted(order, key=order.__getitem__)
    }
    return Cut(whole, tuple(steps), segments, used, _values(whole, steps))


def _pieces(
    part: Segment, kernels: KernelSteps | None, baked: bool, refusals: Refusals
) -> Iterator[tuple[str, EngineSegment]]:
    """A segment as it is, as a program, or cut again; each with its kind."""
    if kernels is not None and kernels.alone:
        for segment in _alone(part, kernels, refusals):
            yield PROGRAM, segment
        return
    products = [] if kernels is None else kernels.of(part.graph.equations)
    owner = {} if kernels is None or baked else expert_owners(part.graph, kernels) | norm_owners(part.graph, kernels)
    if kernels is None or not (products or owner):
        yield _rest(part, kernels, baked, refusals)
        return
    if products:
        whole = engine_segment(part.graph)
        if _refusal(whole, kernels, refusals) is None:
            yield PROGRAM, whole
            return
    owner |= {equation.result.name: product.owner for product in products for equation in product.equations}
    for piece in partition(part.graph, lambda equation: owner.get(equation.results[0].name)):
        if piece.kind != "step":
            yield _rest(piece, kernels, baked, refusals)
            continue
        program = engine_segment(piece.graph)
        if (reason := _refusal(program, kernels, refusals)) is not None:
            raise _no_kernel(kernels, products, piece, reason)
        yield PROGRAM, program


def _alone(part: Segment, kernels: KernelSteps, refusals: Refusals) -> Iterator[EngineSegment]:
    """A segment as programs, its experts apart."""
    owner = expert_owners(part.graph, kernels)
    for piece in partition(part.graph, lambda equation: owner.get(equation.results[0].name)):
        segment = engine_segment(piece.graph)
        if (reason := _refusal(segment, kernels, refusals)) is not None:
            hint = "engines have it: `fp16` or `fp32` as precision, and no `segments: kernels` in a deployment spec"
            where = next((equation.where for equation in piece.graph.equations if equation.where is not None), None)
            raise SpecRTError("LOWER-039", f"no kernels for a whole segment: {reason}", where=where, hint=hint)
        yield segment


def _rest(piece: Segment, kernels: KernelSteps | None, baked: bool, refusals: Refusals) -> tuple[str, EngineSegment]:
    """What is no product of kernels and no norm: an engine's, but for what has no product at all next to norms."""
    segment = engine_segment(piece.graph, baked=baked)
    if kernels is None or baked or not kernels.norms or not rows_only(piece.graph):
        return piece.kind, segment
    return (piece.kind if _refusal(segment, kernels, refusals) else PROGRAM), segment


def _refusal(segment: EngineSegment, kernels: KernelSteps, known: Refusals) -> str | None:
    """Why a segment can't be kernels, or None; asked once for all layers that have it."""
    if segment.digest not in known:
        known[segment.digest] = kernels.refuse(segment.graph)
    return known[segment.digest]


def _no_kernel(kernels: KernelSteps, products: list[LowBitProduct], piece: Segment, reason: str) -> SpecRTError:
    inside = {equation.results[0].name for equation in piece.graph.equations}
    product = next(product for product in products if product.product.result.name in inside)
    message = f"no kernel for the product %{product.product.result.name}: {reason}"
    hint = "choose another precision, or keep these layers: `layers:` in a deployment spec"
    if not kernels.baked and not replace(kernels, baked=True).take(product):
        hint = "engines that hold their weights compute it: `build: {weights: baked}` in a deployment spec"
    return SpecRTError("LOWER-039", message, where=product.product.where, hint=hint)


def _layouts(steps: list[Step], segments: Mapping[str, EngineSegment], kernels: KernelSteps | None) -> dict[str, str]:
    """How the weights of low-bit products lie, by name; each has one reader."""
    ports: dict[tuple[str, str], str] = {}  # of codes and scales, as kernels read them
    half: set[tuple[str, str]] = set()
    found: dict[str, str] = {}
    for segment in segments.values():
        held = {eq.result.name: str(eq.attr["name"]) for eq in segment.graph.equations if eq.op == "weight"}
        architecture = 0 if kernels is None else kernels.architecture
        for value, layout in kernel_layouts(segment.graph.equations, architecture):
            key, nibbles = (segment.file, value.name), value.type.dtype in HALF_BYTES
            ports[key] = layout
            half |= {key} if nibbles else set()
            if nibbles and value.name in held:
                found[held[value.name]] = PAIRS
    for step in steps:
        for port, name in step.inputs.items():
            key = (step.file, port)
            if key in ports and name.startswith("weight:"):
                in_engine = PAIRS if key in half else ROWS
                found[name.removeprefix("weight:")] = ports[key] if step.kind == PROGRAM else in_engine
    return found


def _kernel(graph: Graph, kernels: Mapping[str, AttentionStep]) -> AttentionStep:
    (name,) = (equation.result.name for equation in graph.equations if equation.op == "paged_attention")
    return kernels[name]


def _engine_step(here: EngineSegment, shared: EngineSegment) -> Step:
    """The step, with the port names of the segment that came first; ports of equal segments are in the same order."""
    inputs = dict(zip((value.name for value in shared.graph.inputs), here.inputs.values(), strict=True))
    outputs = dict(zip((port for port, _ in shared.graph.outputs), here.outputs.values(), strict=True))
    return Step(NAME, shared.file, inputs, outputs)


def _weights_in_order(steps: list[Step]) -> list[str]:
    found = {
        name.removeprefix("weight:"): None
        for step in steps
        for name in step.inputs.values()
        if name.startswith("weight:")
    }
    return list(found)


def _values(graph: Graph, steps: list[Step]) -> tuple[Value, ...]:
    known = {value.name: value for value in graph.inputs}
    known |= {value.name: value for equation in graph.equations for value in equation.results}
    names: dict[str, None] = dict.fromkeys(value.name for value in graph.inputs)
    for step in steps:
        for name in (*step.inputs.values(), *step.outputs.values()):
            if ":" not in name:  # no weight and no cache
                names[name] = None
    names.update((value.name, None) for _, value in graph.outputs)
    return tuple(known[name] for name in names)
