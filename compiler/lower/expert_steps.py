"""Which mixtures of experts leave their engine: every one that the kernels know, with all that belongs to it."""

from __future__ import annotations

import logging

from compiler.ir.core import Graph
from compiler.kernels.expert_program import expert_equations
from compiler.lower.low_bit import KernelSteps
from compiler.lower.partition import partition
from compiler.lower.segments import engine_segment

_LOG = logging.getLogger("compiler.lower")


def expert_owners(graph: Graph, kernels: KernelSteps) -> dict[str, str]:
    """The step of each equation's result that goes into one, by the choice of experts.

    An engine computes every expert for every row: right, and as slow as if all were chosen.
    """
    found = expert_equations(graph.equations)
    refused: set[str] = set()
    for piece in partition(graph, lambda equation: found.get(equation.results[0].name)) if found else ():
        reason = kernels.refuse(engine_segment(piece.graph).graph) if piece.kind == "step" else None
        if reason is not None:
            _LOG.info("experts of %s stay in their engine: %s", graph.name, reason)
            refused |= {equation.results[0].name for equation in piece.graph.equations}
    return {name: choice for name, choice in found.items() if name not in refused}
