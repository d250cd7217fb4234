"""The plan: which step reads and writes which value, and the KV cache that lives between runs. Written as plan.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compiler.ir.core import Equation, Graph, Value, walk
from compiler.ir.names import expand, is_template
from compiler.ir.types import Sym, TensorType

ROWS = "rows"  # one element after the other, row-major: of all that has whole bytes


@dataclass(frozen=True)
class Step:
    """One call of an engine or a program of kernels (`file`), or of a kernel (`name`, `attrs`).

    Its ports are bound to values or to `weight:NAME`.
    """

    backend: str
    file: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    config: Mapping[str, str] = field(default_factory=dict)
    kind: str = "engine"
    name: str = ""
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of the bundle: its type, the safetensors file that has it, and how its bytes lie there.

    Without a file the device makes it: `random` says how (compiler/lower/random_weights.py).
    """

    type: TensorType
    file: str | None
    bytes: int
    layout: str = ROWS
    random: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class CacheLayer:
    """The two caches of one attention: [C, heads, block_size, dim] and [C, heads, block_size, value_dim]."""

    k: str
    v: str
    heads: int
    dim: int
    value_dim: int
    dtype: str


@dataclass(frozen=True)
class Cache:
    """The KV cache; blocks hold `block_size` tokens. In a `linear` one a block is a sequence's whole row of places."""

    block_size: int
    layers: tuple[CacheLayer, ...]
    kind: str = "paged"


@dataclass(frozen=True)
class Plan:
    """Inputs, steps in order, outputs, and the cache where the model has one.

    The rest is for devices (docs/gpu-plan.md): types of all values, where weights lie, profiles, the builder's options.
    """

    dims: tuple[Sym, ...]
    inputs: tuple[Value, ...]
    steps: tuple[Step, ...]
    outputs: tuple[tuple[str, Value], ...]
    cache: Cache | None
    values: tuple[Value, ...] = ()
    weights: Mapping[str, StoredWeight] = field(default_factory=dict)
    profiles: tuple[tuple[Sym, ...], ...] = ()
    build: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[int, ...] = ()  # the first step of each stage of a pipeline

    def as_dict(self) -> dict[str, Any]:
        """The content of plan.json."""
        cache = None
        if self.cache is not None:
            layers = [vars(layer) for layer in self.cache.layers]
            cache = {"kind": self.cache.kind, "block_size": self.cache.block_size, "layers": layers}
        return {
            "dims": _ranges(self.dims),
            "inputs": [_port(value.name, value) for value in self.inputs],
            "steps": [
                {
                    "kind": step.kind, "backend": step.backend, "file": step.file, "name": step.name,
                    "inputs": dict(step.inputs), "outputs": dict(step.outputs), "attrs": dict(step.attrs),
                    "config": dict(step.config),
                }
                for step in self.steps
            ],
            "outputs": {name: value.name for name, value in self.outputs},
            "output_types": [_port(name, value) for name, value in self.outputs],
            "cache": cache,
            "values": {value.name: _type(value.type) for value in self.values},
            "weights": {name: _stored(item) for name, item in self.weights.items()},
            "profiles": [_ranges(profile) for profile in self.profiles],
            "build": dict(self.build),
            "stages": list(self.stages),
        }  # fmt: skip

    def write(self, path: Path) -> None:
        """Write plan.json."""
        path.write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")


def _ranges(dims: tuple[Sym, ...]) -> dict[str, list[int]]:
    return {sym.name: [sym.lo, sym.opt, sym.hi] for sym in dims}


def _type(kind: TensorType) -> dict[str, Any]:
    return {"dtype": kind.dtype, "shape": list(kind.shape)}


def _stored(item: StoredWeight) -> dict[str, Any]:
    found = {**_type(item.type), "file": item.file, "bytes": item.bytes, "layout": item.layout}
    return found if item.random is None else {**found, "random": dict(item.random)}


def _port(name: str, value: Value) -> dict[str, Any]:
    return {"name": name, **_type(value.type)}


def cache_of(graph: Graph) -> Cache | None:
    """The KV cache that the graph's states are, in the order of the layers; None where it has none."""
    names = {
        equation.result.name: str(equation.attr["name"]) for equation in walk(graph.equations) if equation.op == "state"
    }
    layers: list[CacheLayer] = []
    block, kind = 0, "paged"
    updated = {eq.result.name: eq.values[0] for eq in walk(graph.equations) if eq.op == "update_cache"}
    for top in graph.equations:
        attentions = [equation for equation in walk((top,)) if equation.op in ("paged_attention", "cached_attention")]
        for index in range(rounds(top)):
            for equation in attentions:
                if equation.op == "cached_attention":
                    kind, k, v = "linear", *(updated[value.name] for value in equation.values[1:3])
                else:
                    k, v = equation.values[3:5]
                heads, block, dim = (int(size) for size in k.type.shape[1:])
                wide = int(v.type.shape[3])
                k_name, v_name = (stored_name(names[value.name], index) for value in (k, v))
                layers.append(CacheLayer(k_name, v_name, heads, dim, wide, k.type.dtype))
    return Cache(block, tuple(layers), kind) if layers else None


def rounds(equation: Equation) -> int:
    """How often an equation runs: the count of a `repeat`, else once."""
    count = equation.attr.get("count", 1) if equation.body is not None else 1
    assert isinstance(count, int)  # the type rule of repeat
    return count


def stored_name(name: str, index: int | None) -> str:
    """The name of a weight or state in round `index` of `repeat`."""
    return expand(name, index) if index is not None and is_template(name) else name
