"""Steps in which ranks exchange values: between two segments, by a library that is told addresses and sizes."""

from __future__ import annotations

from compiler.ir.core import Equation
from compiler.lower.plan import Step

BACKEND = "nccl"
KIND = "collective"
EXCHANGES = ("all_reduce", "all_gather")


def exchange_step(equation: Equation) -> Step:
    """The plan's step of an exchange. Raises AssertionError for a gather along another axis than the last."""
    axis = equation.attr.get("axis", -1)
    assert axis == -1  # what runtimes know
    attrs = {"axis": axis, "ranks": equation.attr["ranks"]}
    inputs, outputs = {"x": equation.values[0].name}, {"out": equation.result.name}
    return Step(BACKEND, "", inputs, outputs, kind=KIND, name=equation.op, attrs=attrs)
