"""Makes engine segments alike: values get names that do not tell the layer, weights and caches become inputs, text
gives a hash.

Equal segments are one file, one build and one engine, however many layers a model has.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from compiler.ir.core import Equation, Graph, Value, substitute, used_values
from compiler.ir.printer import print_graph

_BOUND = {"weight": "weight", "state": "cache"}  # how a plan's step names what it binds; a value has no colon
_LAYER = re.compile(r"^layers\.\d+\.")


@dataclass(frozen=True)
class EngineSegment:
    """One engine call: the graph that all equal ones share, and what its ports are bound to here."""

    graph: Graph
    digest: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    @property
    def file(self) -> str:
        """Where a bundle has it."""
        return f"segments/{self.digest}.ir"


def engine_segment(part: Graph, *, baked: bool = False) -> EngineSegment:
    """A part of an unrolled graph as an engine segment; `baked` keeps its weights inside.

    A linear cache is an input, and what it is after its update an output: both are bound to the same memory.
    """
    kept = ("state",) if baked else ("weight", "state")
    bound_to = {eq.result.name: f"{_BOUND[eq.op]}:{eq.attr['name']}" for eq in part.equations if eq.op in kept}
    equations = tuple(equation for equation in part.equations if equation.results[0].name not in bound_to)
    stored = tuple(equation.result for equation in part.equations if equation.results[0].name in bound_to)
    updates = tuple(eq for eq in equations if eq.op == "update_cache" and eq.values[0].name in bound_to)
    # a whole decoder is alone of its kind, and has every name once for each layer
    names = _names((*part.inputs, *stored), equations, without=_LAYER if not updates else None)
    inputs = tuple(Value(names[value.name], value.type) for value in (*part.inputs, *stored))
    renamed = tuple(_renamed(equation, names) for equation in equations)
    results = (*(value for _, value in part.outputs), *(equation.result for equation in updates))
    ports = _ports([names[value.name] for value in results], {value.name for value in inputs})
    outputs = tuple((port, Value(names[value.name], value.type)) for port, value in zip(ports, results, strict=True))
    used = {dim for value in (*inputs, *(eq.result for eq in renamed)) for dim in value.type.shape}
    dims = tuple(sym for sym in part.dims if sym.name in used)
    graph = Graph("segment", dims, inputs, renamed, outputs)
    bound = {names[value.name]: value.name for value in part.inputs}
    bound |= {names[value.name]: bound_to[value.name] for value in stored}
    caches = {equation.result.name: bound_to[equation.values[0].name] for equation in updates}
    written = {port: caches.get(value.name, value.name) for port, value in zip(ports, results, strict=True)}
    return EngineSegment(graph, digest(graph), bound, written)


def digest(graph: Graph) -> str:
    """A hash of what the graph computes: neither names of values nor places in the spec are in it."""
    order = [*graph.inputs, *(value for equation in graph.equations for value in equation.results)]
    names = {value.name: f"v{index}" for index, value in enumerate(order)}
    plain = Graph(
        "segment",
        graph.dims,
        tuple(Value(names[value.name], value.type) for value in graph.inputs),
        tuple(_renamed(equation, names) for equation in graph.equations),
        tuple((f"o{index}", Value(names[value.name], value.type)) for index, (_, value) in enumerate(graph.outputs)),
    )
    return hashlib.sha256(print_graph(plain, places=False).encode()).hexdigest()[:16]


def _names(
    inputs: tuple[Value, ...], equations: tuple[Equation, ...], without: re.Pattern[str] | None
) -> dict[str, str]:
    """`layers.3.mlp.up` -> `mlp.up`, with a number where two layers meet in one segment."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for value in (*inputs, *(value for equation in equations for value in equation.results)):
        base = value.name if without is None else without.sub("", value.name)
        name, number = base, 1
        while name in taken:
            number += 1
            name = f"{base}.{number}"
        taken.add(name)
        names[value.name] = name
    return names


def _ports(names: list[str], taken: set[str]) -> list[str]:
    """Names of outputs as words, which is what the IR's text has: `attn.qkv` -> `attn_qkv`."""
    ports: list[str] = []
    for name in names:
        base = name.replace(".", "_")
        port, number = base, 1
        while port in taken or port in ports:
            number += 1
            port = f"{base}_{number}"
        ports.append(port)
    return ports


def _renamed(equation: Equation, names: Mapping[str, str]) -> Equation:
    values = {value.name: Value(names[value.name], value.type) for value in used_values(equation)}
    results = tuple(Value(names[value.name], value.type) for value in equation.results)
    return replace(substitute(equation, values), results=results)
