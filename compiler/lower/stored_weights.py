"""What is stored instead of computed: everything that depends on weights alone, as joined matrices or `1 + gain`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compiler.ir.core import Equation, Graph, Value, used_values
from compiler.ir.ops import REGISTRY
from compiler.ir.types import TensorType
from compiler.lower.plan import ROWS

if TYPE_CHECKING:
    import torch

# Never stored computed: codes and scales stay apart, that is their point.
_KEPT = frozenset({"dequantize"})


@dataclass(frozen=True)
class Tensor:
    """A tensor to store: a weight in the type that the graph states, or what `graph` (without inputs) computes.

    `layout` says how its bytes lie (compiler/lower/layouts.py).
    """

    name: str
    type: TensorType
    graph: Graph | None = None
    layout: str = ROWS

    def make(self, weights: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Its value, computed as the interpreter does."""
        from compiler.ir.interpreter import run, torch_dtype

        if self.graph is None:
            return weights(self.name).to(torch_dtype(self.type.dtype))
        return run(self.graph, {}, weights)["out"]


def store(graph: Graph) -> tuple[Graph, dict[str, Tensor]]:
    """The graph with what weights alone decide replaced by weights, and all its weights by name; no `repeat` in it."""
    known: dict[str, Equation] = {}
    derived: dict[str, Equation] = {}  # by the value's name; what it replaces
    tensors: dict[str, Tensor] = {}
    equations: list[Equation] = []
    taken = {str(equation.attr["name"]) for equation in graph.equations if equation.op == "weight"}
    for equation in graph.equations:
        if equation.op in ("weight", "const"):
            known[equation.result.name] = equation
            equations.append(equation)
            continue
        if not decided_by_weights(equation, known):
            equations.append(equation)
            continue
        known[equation.result.name] = equation
        derived[equation.result.name] = equation
        name = _unique(equation.result.name, taken)
        tensors[name] = Tensor(name, equation.result.type, _recipe(equation, known))
        equations.append(replace(equation, op="weight", args=(), attrs=(("name", name),)))
    read = {value.name for equation in equations for value in used_values(equation)}
    read |= {value.name for _, value in graph.outputs}
    left = tuple(equation for equation in equations if not REGISTRY[equation.op].source or equation.result.name in read)
    used: dict[str, Tensor] = {}
    for equation in left:
        if equation.op == "weight":
            name = str(equation.attr["name"])
            used[name] = tensors.get(name, Tensor(name, equation.result.type))
    return replace(graph, equations=left), used


def decided_by_weights(equation: Equation, known: Mapping[str, Equation]) -> bool:
    """Whether an equation is stored computed; `known` are weights, constants and such equations, by result."""
    if equation.op in _KEPT or REGISTRY[equation.op].effect or not equation.values or len(equation.results) != 1:
        return False
    if any(isinstance(dim, str) for dim in equation.result.type.shape):
        return False
    operands = [known.get(value.name) for value in equation.values]
    return all(operands) and any(found is not None and found.op != "const" for found in operands)


def _recipe(equation: Equation, known: Mapping[str, Equation]) -> Graph:
    """The graph that computes one value from weights."""
    needed: dict[str, Equation] = {}

    def visit(value: Value) -> None:
        if value.name not in needed:
            found = known[value.name]
            for operand in found.values:
                visit(operand)
            needed[value.name] = found

    visit(equation.result)
    return Graph("stored", (), (), tuple(needed.values()), (("out", equation.result),))


def _unique(name: str, taken: set[str]) -> str:
    unique, number = name, 1
    while unique in taken:
        number += 1
        unique = f"{name}.{number}"
    taken.add(unique)
    return unique
