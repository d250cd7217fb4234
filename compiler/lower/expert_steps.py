"""Which mixtures of experts leave their engine: every one that the kernels know, with all that belongs to it."""

from __future__ import annotations

from compiler.ir.core import Graph
from compiler.kernels.expert_codes import why_not_read
from compiler.kernels.expert_program import expert_equations
from compiler.lower.low_bit import KernelSteps, low_bit_experts
from compiler.passes.quantization_plan import Storage
from specs.errors import SpecRTError


def expert_owners(graph: Graph, kernels: KernelSteps) -> dict[str, str]:
    """The step of each equation's result that goes into one, by the choice of experts.

    An engine computes every expert for every row: right, and as slow as if all were chosen. Codes it does not read:
    raises SpecRTError LOWER-039 where they are not taken.
    """
    owner, reason = kernels.known(graph, expert_equations(graph.equations), "experts")
    for product, _ in low_bit_experts(graph.equations):
        if product.result.name not in owner:
            message = (
                f"no kernel for the experts' product %{product.result.name}: {reason or 'they are no part of a sum'}"
            )
            hint = "choose another precision, or keep these layers: `layers:` in a deployment spec"
            raise SpecRTError("LOWER-039", message, where=product.where, hint=hint)
    return owner


def why_not_kernels(storage: Storage) -> str | None:
    """Why kernels do not read matrices of experts that are stored so, or None."""
    group, several = storage.block[-1] if storage.block else 0, storage.type != "f8e4m3"
    if storage.permuted or (several and storage.scale_shape[-2] != storage.shape[-2]):
        return "no kernel of experts reads columns in another order, or a scale for several rows"
    return why_not_read(storage.type, storage.scale, group, storage.shape[-1], outer=storage.outer)
