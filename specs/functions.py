"""The functions and operators of the expression language, on numbers and on numpy vectors."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

Value = Any
"""int, float, bool, str, None, list, dict (what config.json can hold) or a numpy vector (in formulas)."""

MAX_BITS = 4096
CONSTANTS: dict[str, Value] = {"true": True, "false": False, "none": None, "pi": math.pi}


def _either(scalar: Callable[..., Value], vector: str) -> Callable[..., Value]:
    """A function of numbers that also takes numpy vectors; numpy is imported only when a vector comes."""

    def call(*args: Value) -> Value:
        if all(isinstance(a, int | float) for a in args):
            return scalar(*args)
        if any(isinstance(a, str | list | dict | None) for a in args):
            raise TypeError("expects numbers")
        import numpy

        return getattr(numpy, vector)(*args)

    return call


def _where(test: Value, yes: Value, no: Value) -> Value:
    if isinstance(test, bool):
        return yes if test else no
    import numpy

    return numpy.where(test, yes, no)


def _clip(x: Value, low: Value, high: Value) -> Value:
    return FUNCTIONS["min"][0](FUNCTIONS["max"][0](x, low), high)


FUNCTIONS: dict[str, tuple[Callable[..., Value], int]] = {
    "abs": (_either(abs, "abs"), 1),
    "sqrt": (_either(math.sqrt, "sqrt"), 1),
    "exp": (_either(math.exp, "exp"), 1),
    "log": (_either(math.log, "log"), 1),
    "log2": (_either(math.log2, "log2"), 1),
    "tanh": (_either(math.tanh, "tanh"), 1),
    "floor": (_either(math.floor, "floor"), 1),
    "ceil": (_either(math.ceil, "ceil"), 1),
    "int": (_either(int, "trunc"), 1),
    "min": (_either(min, "minimum"), 2),
    "max": (_either(max, "maximum"), 2),
    "clip": (_clip, 3),
    "where": (_where, 3),
    "len": (len, 1),
}


def _divide(a: Value, b: Value) -> Value:
    # Whole numbers that divide exactly stay whole, so that `d_model / heads` is a dimension.
    if type(a) is int and type(b) is int and b != 0 and a % b == 0:
        return a // b
    return a / b


def _power(a: Value, b: Value) -> Value:
    if isinstance(a, int) and isinstance(b, int) and a.bit_length() * abs(b) > MAX_BITS:
        raise OverflowError("the power is too large")
    result = a**b
    if isinstance(result, complex):
        raise ValueError("a root of a negative number")
    return result


BINARY: dict[type[ast.operator], Callable[[Value, Value], Value]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: _divide,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: _power,
}  # fmt: skip
COMPARE: dict[type[ast.cmpop], Callable[[Value, Value], Value]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
