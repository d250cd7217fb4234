"""Computes logits of selected tokens only: gathers the rows `select` as early as they can be, of packed tokens [T,..]
or of a padded batch [B,S,..].

Going back from the logits, everything that works on each row alone and serves nothing else moves behind the gather: the
final norm and the head, and without `repeat` also the last layer's part behind its attention.
"""

from __future__ import annotations

from dataclasses import replace

from compiler.ir.core import Equation, Graph, Value
from compiler.ir.types import Shape, Sym, TensorType
from compiler.passes.pattern import Scope
from compiler.passes.rewrite import Names
from compiler.passes.rows import has_rows, replace_rows, replaced_type, why_not
from compiler.passes.runner import Log, Pass

RULE = "select_rows"
PACKED: Shape = ("T",)
PADDED: Shape = ("B", "S")
_NEW: Shape = ("N",)
# They read or write what belongs to other rows.
_STAY = frozenset({"repeat", "paged_attention", "update_cache", "cached_attention"})


def _select(graph: Graph, log: Log, old: Shape) -> Graph:
    logits = dict(graph.outputs).get("logits")
    if logits is None:
        log.refuse(RULE, graph.outputs[0][1].name, None, "the graph has no output `logits`")
        return graph
    scope = Scope(graph.equations, tuple(value for _, value in graph.outputs))
    definition = scope.definition(logits)
    where = None if definition is None else definition.where
    if not has_rows(logits, old):
        wanted = "packed" if old == PACKED else "padded"
        log.refuse(
            RULE, logits.name, where, f"the logits are {logits.type}, not {wanted} [{','.join(map(str, old))},V]"
        )
        return graph
    if any(value.name == "select" for value in graph.inputs) or any(sym.name == "N" for sym in graph.dims):
        log.refuse(RULE, logits.name, where, "the graph already has `select`")
        return graph
    region = _region(scope, logits, old, {name: value for name, value in graph.outputs if name != "logits"})
    return _move(graph, scope, logits, old, region, log)


def _region(scope: Scope, logits: Value, old: Shape, others: dict[str, Value]) -> set[str]:
    """First results of the equations that move behind the gather."""
    kept = {value.name for value in others.values()}
    region: set[str] = set()
    for equation in reversed(scope.equations):
        users = [user for value in equation.results for user in scope.users.get(value.name, ())]
        serves = bool(users) or equation.results[0].name == logits.name
        moves = (
            serves
            and all(user.results[0].name in region for user in users)
            and not any(value.name in kept for value in equation.results)
            and equation.op not in _STAY
            and any(has_rows(arg, old) for arg in equation.args)
            and why_not(equation, old) is None
        )
        if moves:
            region.add(equation.results[0].name)
    return region


def _move(graph: Graph, scope: Scope, logits: Value, old: Shape, region: set[str], log: Log) -> Graph:
    names = Names(graph)
    select = Value(names.unique("select"), TensorType("i32", _NEW))
    attrs = (("dims", len(old)),) if len(old) > 1 else ()
    values: dict[str, Value] = {}
    equations: list[Equation] = []

    def gather(value: Value, reader: Equation | None) -> None:
        """Take the selected rows of a value from outside of the region, once."""
        if value.name in values or not has_rows(value, old):
            return
        definition = scope.definition(value)
        where = definition.where if definition is not None else None if reader is None else reader.where
        rows = Value(names.unique(f"{value.name}_rows"), replaced_type(value.type, old, _NEW))
        equations.append(Equation("gather", (value, select), (rows,), attrs, None, where))
        values[value.name] = rows
        log.hit(RULE, rows.name, where)

    for equation in scope.equations:
        if equation.results[0].name not in region:
            equations.append(equation)
            continue
        for value in equation.values:
            gather(value, equation)
        new = replace_rows(equation, values, old, _NEW)
        values.update((value.name, value) for value in new.results)
        equations.append(new)
    gather(logits, None)
    outputs = tuple((name, values[value.name] if name == "logits" else value) for name, value in graph.outputs)
    dims = (*graph.dims, _rows(graph, old))
    return replace(graph, dims=dims, inputs=(*graph.inputs, select), equations=tuple(equations), outputs=outputs)


def _rows(graph: Graph, old: Shape) -> Sym:
    """The dim of the rows: one for each sequence, at most all tokens of a call."""
    sizes = {sym.name: sym for sym in graph.dims}
    if old == PADDED:  # a call has one token of every sequence, or the tokens of one
        return Sym("N", 1, sizes["B"].opt, max(sizes["B"].hi, sizes["S"].hi))
    tokens = sizes["T"]
    return Sym("N", 1, min(tokens.opt, sizes["B"].opt) if "B" in sizes else 1, tokens.hi)


SELECT_ROWS = Pass("select_rows", lambda graph, log: _select(graph, log, PACKED), required=True)
SELECT_PADDED_ROWS = Pass("select_rows", lambda graph, log: _select(graph, log, PADDED), required=True)
