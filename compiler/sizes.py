"""How large a model is: numbers and bytes of its weights by part, and of its KV cache by token."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from compiler.api import Prepared
from compiler.ir.core import Equation, Graph, walk
from compiler.ir.names import expand
from compiler.ir.types import DTYPES

_LAYER = re.compile(r"layers\.(?:\d+|\{[^}]*\})\.")  # how the names of weights in a layer begin


@dataclass(frozen=True)
class PartSize:
    """The weights of one part of a spec, over all layers: `attn` of 6 layers, 24 tensors."""

    part: str
    layers: int | None  # None where the part is not in a layer
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model in the precision that it was prepared for."""

    parts: tuple[PartSize, ...]
    parameters: int
    weight_bytes: int
    cache_bytes_per_token: int
    cache_bytes_max: int  # all sequences at their longest

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "parts": [asdict(part) for part in self.parts]}


def sizes(prepared: Prepared) -> Sizes:
    """Sizes of a prepared model, from shapes alone."""
    return graph_sizes(prepared.graph, prepared.limits.batch, prepared.limits.sequence)


def graph_sizes(graph: Graph, max_batch: int, max_sequence: int) -> Sizes:
    """Sizes by part, in the order of a graph that serves `max_batch` sequences of `max_sequence` tokens."""
    rows: dict[tuple[str, bool], dict[str, tuple[int, int]]] = {}
    for equation, count in counted(graph.equations):
        if equation.op == "weight":
            name, kind = str(equation.attr["name"]), equation.result.type
            numbers = prod(kind.static_shape())
            part = _LAYER.sub("", name).split(".")[0]
            row = rows.setdefault((part, bool(_LAYER.match(name))), {})
            row.update((expand(name, index), (numbers, numbers * DTYPES[kind.dtype] // 8)) for index in range(count))
    parts = tuple(
        PartSize(
            part,
            len({name.split(".")[1] for name in found}) if layered else None,
            len(found),
            sum(numbers for numbers, _ in found.values()),
            sum(size for _, size in found.values()),
        )
        for (part, layered), found in rows.items()
    )
    token = cache_bytes_per_token(graph)
    places = max((row for row in _rows_of_places(graph)), default=max_sequence)
    return Sizes(
        parts,
        sum(part.parameters for part in parts),
        sum(part.bytes for part in parts),
        token,
        token * max_batch * places,
    )


def _rows_of_places(graph: Graph) -> Iterator[int]:
    """How long the rows of linear caches are: every sequence takes one, whatever its length."""
    for equation in walk(graph.equations):
        if equation.op == "state" and equation.result.type.shape[0] == "B":
            yield int(equation.result.type.shape[2])


def cache_bytes_per_token(graph: Graph) -> int:
    """Bytes of K and V that one more token takes in all layers; 0 for a graph without a cache."""
    total = 0
    for equation, count in counted(graph.equations):
        if equation.op == "state":
            kind = equation.result.type
            _blocks, heads, _tokens, dim = kind.shape
            total += count * int(heads) * int(dim) * DTYPES[kind.dtype] // 8
    return total


def cache_rows_per_token(graph: Graph) -> int:
    """Rows of K and V that one more token takes in all layers, one for each key head."""
    return sum(
        count * int(equation.result.type.shape[1])
        for equation, count in counted(graph.equations)
        if equation.op == "state"
    )


def counted(equations: tuple[Equation, ...], times: int = 1) -> Iterator[tuple[Equation, int]]:
    """Every equation with how often it runs: those in a `repeat` once for each round."""
    for equation in equations:
        yield equation, times
        if equation.body is not None:
            rounds = equation.attr["count"]
            assert isinstance(rounds, int)
            yield from counted(equation.body.equations, times * rounds)
