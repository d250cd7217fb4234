"""Makes the network of one segment, its profiles, and what names of layers say of the spec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compiler.ir.core import Graph, Value
from compiler.ir.types import Sym
from compiler.lower.tensorrt import attention, cached, operations, quantized, routing  # noqa: F401 (they register emissions)
from compiler.lower.tensorrt.dialects import Dialect
from compiler.lower.tensorrt.emitter import Baked, Emitter

ENDS = (64, 512)  # tokens in a call: decoding, short prompts; what is fast at 2048 takes twice its time at 128


def create_network(trt: Any, builder: Any, dialect: Dialect) -> Any:
    """An empty network of the dialect's typing."""
    flags = 0
    for name in dialect.flags:
        flags |= 1 << int(getattr(trt.NetworkDefinitionCreationFlag, name))
    return builder.create_network(flags)


def emit(
    trt: Any, graph: Graph, network: Any, dialect: Dialect, baked: Baked | None = None, *, native: bool = False
) -> Emitter:
    """Write a segment into a network, ports named as in the IR; keep the emitter until the network is built.

    `native`: an encoder's attention too is TensorRT's own layer, where that has its features.
    Raises SpecRTError LOWER-031 for a type that the version lacks, LOWER-032 where TensorRT refuses a layer,
    LOWER-040 for scales of blocks that are inputs.
    """
    emitter = Emitter(trt, network, dialect, baked, quantized.outlook(graph), native)
    for value in graph.inputs:
        emitter.input(value)
    emitter.run(graph.equations)
    taken = [emitter.scope[value.name] for value in graph.inputs]
    for port, value in graph.outputs:
        tensor = emitter.scope[value.name]
        if any(tensor is other for other in taken):  # a port of its own for what is an input or another output too
            tensor = emitter.out(network.add_identity(tensor), value.type.dtype, f"output {port}")
        taken.append(tensor)
        tensor.name = port
        network.mark_output(tensor)
        if not dialect.strong:
            tensor.dtype = emitter.type(value.type.dtype)
        tensor.allowed_formats = 1 << int(trt.TensorFormat.LINEAR)
    return emitter


def profiles(dims: Sequence[Sym], ends: Sequence[int] = ENDS) -> tuple[tuple[Sym, ...], ...]:
    """The optimization profiles of a plan, by tokens in a call: up to each of `ends`, and the rest.

    Each has all dims. Rows of logits are at most tokens; the first is tuned for one token of every sequence, the last
    for what `T` states, those between for half of their end.
    """
    tokens = next((sym for sym in dims if sym.name == "T"), None)
    if tokens is None or tokens.hi <= ends[0]:
        return (tuple(dims),)
    batch = next((sym.hi for sym in dims if sym.name == "B"), 1)
    chosen: list[tuple[Sym, ...]] = []
    low = tokens.lo
    for end in (*(end for end in ends if end < tokens.hi), tokens.hi):
        best = batch if not chosen else end // 2 if end < tokens.hi else tokens.opt
        here = Sym("T", low, min(max(best, low), end), end)
        chosen.append(tuple(_within(sym, here) for sym in dims))
        low = end + 1
    return tuple(chosen)


def _within(sym: Sym, tokens: Sym) -> Sym:
    if sym.name == "T":
        return tokens
    # all rows of logits of a decode step are wanted, one or few of a prompt
    best = tokens.opt if tokens.lo == 1 else sym.opt
    return Sym("N", sym.lo, min(best, sym.hi), min(tokens.hi, sym.hi)) if sym.name == "N" else sym


def add_profiles(builder: Any, config: Any, graph: Graph, chosen: Sequence[Sequence[Sym]]) -> None:
    """Give a builder's configuration one profile for each set of ranges, with the shapes of the graph's inputs."""
    for ranges in chosen:
        by_name = {sym.name: sym for sym in ranges}
        profile = builder.create_optimization_profile()
        for value in graph.inputs:
            if any(isinstance(dim, str) for dim in value.type.shape):
                profile.set_shape(value.name, *(shape_of(value, by_name, which) for which in ("lo", "opt", "hi")))
        config.add_optimization_profile(profile)


def shape_of(value: Value, ranges: dict[str, Sym], which: str) -> tuple[int, ...]:
    """The shape of a value at the `lo`, `opt` or `hi` of every dim."""
    return tuple(int(getattr(ranges[dim], which)) if isinstance(dim, str) else dim for dim in value.type.shape)
