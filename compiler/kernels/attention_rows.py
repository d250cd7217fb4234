"""Attention of padded rows without a cache, as a launch of a program, and which columns it reads where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compiler.ir.core import Equation, Graph
from compiler.kernels.attention import Launch, power
from compiler.kernels.row_source import RefusedError, rows_of

ROWS, TILE = 64, 64  # tokens of queries and of keys that a block looks at together


def views(graph: Graph, alias: Mapping[str, str]) -> dict[str, Equation]:
    """Columns of whole rows that attention alone reads, by name; `alias` are names of the same elements."""
    public = {value.name for _, value in graph.outputs}
    found: dict[str, Equation] = {}
    for equation in graph.equations:
        if equation.op != "slice" or equation.attr["axis"] != -1:
            continue
        (whole,), name = equation.values, equation.result.name
        names = {name, *(other for other, home in alias.items() if home == name)}
        readers = [eq for eq in graph.equations if names & {value.name for value in eq.values}]
        alone = all(eq.op == "attention" or eq.results[0].name in names for eq in readers)
        if alone and not names & public and len(whole.type.shape) == len(rows_of(whole)) + 1:
            found[name] = equation
    return found


def within(equation: Equation, read: Mapping[str, tuple[int, int]]) -> Launch:
    """The kernel; `read` has the columns of a stored row and the first that is wanted, for q, k and v.

    Raises RefusedError for what encoders do not have: prefixes, sinks, linear biases.
    """
    q, k, v, *_ = equation.values
    if any(other is not None for other in equation.args[4:]) or equation.attr.get("slopes") is not None:
        raise RefusedError("attention without a cache, but with a prefix, sinks or linear biases")
    if len(rows_of(q)) != 2 or len(q.type.shape) != 4:
        raise RefusedError(f"attention of {q.type.shape}")
    (heads, dim), (groups, wide) = ((int(size) for size in value.type.shape[-2:]) for value in (q, v))
    constants: dict[str, Any] = {f"{name}_{part}": size for name, both in read.items()
                                 for part, size in zip(("row", "start"), both, strict=True)}  # fmt: skip
    constants |= {"heads": heads, "groups": groups, "dim": dim, "wide": wide}
    constants |= {name: equation.attr.get(name) for name in ("scale", "causal", "window", "softcap")}
    constants |= {"rows": ROWS, "tile": TILE, "dim_span": power(dim, 16), "wide_span": power(wide, 16)}
    kinds = {"q": q.type.dtype, "k": k.type.dtype, "v": v.type.dtype, "positions": "i32", "out": q.type.dtype}
    arguments = (*kinds.items(), ("S", "int"), ("count", "int"))
    return Launch("within", "within.within", arguments, constants, 4, 2)
