"""Which norms leave their engine where a toolchain says so: of whole rows, with what works on rows around them."""

from __future__ import annotations

from collections.abc import Mapping

from compiler.ir.core import Equation, Graph, Value
from compiler.kernels.row_source import ELEMENTWISE, rows_of
from compiler.lower.low_bit import KernelSteps

NORMS = ("rms_norm", "layer_norm")


def norm_owners(graph: Graph, kernels: KernelSteps) -> dict[str, str]:
    """The step of each equation's result that goes into one, by the first norm of the step.

    Sums with a product stay with the product, which adds before it rounds.
    """
    return kernels.known(graph, _groups(graph), "norms")[0] if kernels.norms else {}


def rows_only(graph: Graph) -> bool:
    """Whether a piece has no product: angles of positions, a sum; an engine would be several launches."""
    return not any(equation.op in ("matmul", "gather_matmul") for equation in graph.equations)


def _groups(graph: Graph) -> dict[str, str]:
    """Runs of equations on rows that hold a norm: with it what makes its input of looked up rows, and what reads it."""
    made = {value.name: equation for equation in graph.equations for value in equation.results}
    owner: dict[str, str] = {}
    current: str | None = None
    for equation in graph.equations:
        if equation.op in ("weight", "const"):
            continue
        name = equation.results[0].name
        if is_norm(equation):
            current = current if current is not None and _alike(equation, made[current]) else name
            owner[name] = current
            for before in _lookups(equation, made):
                owner.setdefault(before, current)
        elif not _on_rows(equation):
            current = None
        elif current is not None and any(owner.get(value.name) == current for value in equation.values):
            owner[name] = current
    return owner


def is_norm(equation: Equation) -> bool:
    """Whether an equation is a norm of whole rows."""
    return equation.op in NORMS and _on_rows(equation)


def _on_rows(equation: Equation) -> bool:
    """Whether an equation works on whole rows: [rows, columns] in numbers that kernels have."""
    result = equation.results[0]
    rows = rows_of(result)
    return equation.op in (*ELEMENTWISE, *NORMS) and bool(rows) and len(result.type.shape) == len(rows) + 1


def _alike(equation: Equation, other: Equation) -> bool:
    return rows_of(equation.results[0]) == rows_of(other.results[0])


def _lookups(norm: Equation, made: Mapping[str, Equation]) -> list[str]:
    """What makes a norm's input of rows that are looked up; nothing where something else goes into it too."""
    found: list[str] = []
    left: list[Value] = list(norm.values[:1])
    while left:
        equation = made.get(left.pop().name)
        if equation is None or equation.op in ("weight", "const"):
            continue
        if equation.op != "gather" and not (_on_rows(equation) and equation.op in ELEMENTWISE):
            return []
        if not _alike(equation, norm):
            return []
        found.append(equation.results[0].name)
        left += equation.values if equation.op != "gather" else ()
    return found
