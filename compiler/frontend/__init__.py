"""Spec + configuration -> graph: each part becomes the plain equations of its paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from compiler.frontend.context import Context
from compiler.frontend.wiring import wire
from compiler.ir import Graph, Sym
from compiler.ir.verify import verify
from specs import equations as eq

if TYPE_CHECKING:
    from specs.schema import Spec
    from specs.weight_map import WeightDecl


@dataclass(frozen=True)
class Limits:
    """The largest batch B (sequences) and sequence S (tokens) that a graph is for; they bound its symbolic dims."""

    batch: int = 8
    sequence: int = 2048


@dataclass(frozen=True)
class Built:
    """A graph over tokens [B,S], and the weights it needs, one declaration per tensor."""

    graph: Graph
    weights: tuple[WeightDecl, ...]

    @property
    def parameters(self) -> int:
        """How many numbers the weights hold."""
        return sum(prod(decl.shape) for decl in self.weights)


def build(spec: Spec, config: Mapping[str, Any], limits: Limits | None = None) -> Built:
    """The graph of `spec` under `config` (names of its `config:` block); raises SpecRTError SPEC-xxx or IR-002."""
    limits = limits or Limits(sequence=int(config.get("context") or Limits.sequence))
    ctx = Context(config, limits.sequence)
    scope = wire(ctx, spec)
    outputs = [(name, scope[name]) for name in eq.OUTPUTS if name in scope]
    dims = (
        Sym("B", 1, 1, limits.batch),
        Sym("S", 1, min(512, limits.sequence), limits.sequence),
    )
    graph = ctx.builder.graph(spec.name, dims, tuple(ctx.inputs.values()), outputs)
    verify(graph, "build")
    return Built(graph, tuple(ctx.weights.values()))
