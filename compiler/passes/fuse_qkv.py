"""Joins the query, key and value products of an attention: one product with all three weights, and three slices."""

from __future__ import annotations

from collections.abc import Iterator

from compiler.ir.core import Arg, Equation, Value
from compiler.passes.linears import why_not_joined
from compiler.passes.pattern import Match, Scope, show
from compiler.passes.rewrite import Rule, Seed, always, rewrite
from compiler.passes.runner import Pass

# Operations between a product and the attention that reads it, by the operand that comes from the product.
_BETWEEN = {"reshape": 0, "rotate": 0, "rms_norm": 0, "layer_norm": 0, "cast": 0, "maximum": 0, "minimum": 0,
            "update_cache": 1}  # fmt: skip


def _seeds(scope: Scope) -> Iterator[Seed]:
    """Each attention's query, key and value products, found by going back from its operands."""
    for equation in scope.equations:
        if equation.op not in ("attention", "paged_attention", "cached_attention"):
            continue
        roots: dict[str, Value] = {}
        reason = None
        for letter, arg in zip("qkv", equation.args, strict=False):
            value = _source(arg, scope)
            definition = scope.definition(value)
            if isinstance(value, Value) and definition is not None and definition.op in ("matmul", "add"):
                roots[letter] = value
            elif definition is not None and definition.op == "slice":
                reason = f"its {letter} is {show(definition)}: joined already"
            else:
                reason = f"its {letter} does not come from a product"
        reason = reason or _inputs_differ(roots, scope)
        yield Seed(equation.results[0], equation.where, roots, reason)


def _source(arg: Arg, scope: Scope) -> Arg:
    """The value that an operand is a view, rotation or norm of."""
    definition = scope.definition(arg)
    while definition is not None and definition.op in _BETWEEN:
        arg = definition.args[_BETWEEN[definition.op]]
        definition = scope.definition(arg)
    return arg


def _product(value: Value, scope: Scope) -> Equation | None:
    definition = scope.definition(value)
    if definition is not None and definition.op == "add":
        operands = (scope.definition(arg) for arg in definition.args)
        return next((found for found in operands if found is not None and found.op == "matmul"), None)
    return definition


def _inputs_differ(roots: dict[str, Value], scope: Scope) -> str | None:
    products = {letter: _product(value, scope) for letter, value in roots.items()}
    biased = [letter for letter, value in roots.items() if (found := scope.definition(value)) and found.op == "add"]
    if biased and len(biased) < len(roots):
        return f"only {' and '.join(biased)} of q, k and v have a bias"
    inputs = {letter: product.args[0] for letter, product in products.items() if product is not None}
    if len(inputs) == 3 and len(set(inputs.values())) > 1:
        shown = ", ".join(f"{letter} of {arg}" for letter, arg in inputs.items())
        return f"q, k and v are not products of one value: {shown}"
    return None


def _refuse(match: Match) -> str | None:
    return why_not_joined(match, ("wq", "wk", "wv"), ("bq", "bk", "bv") if "bq" in match.values else ())


_SLICES = """
    %q = slice(%qkv) {axis = -1, start = 0, stop = $wq_stop}
    %k = slice(%qkv) {axis = -1, start = $wq_stop, stop = $wk_stop}
    %v = slice(%qkv) {axis = -1, start = $wk_stop, stop = $wv_stop}
"""

RULES = (
    Rule(
        "qkv_bias",
        before="""
            %q0 = matmul(%x, %wq) {transpose_b = true}
            %q = add(%q0, %bq)
            %k0 = matmul(%x, %wk) {transpose_b = true}
            %k = add(%k0, %bk)
            %v0 = matmul(%x, %wv) {transpose_b = true}
            %v = add(%v0, %bv)
        """,
        after="""
            %w = concat(%wq, %wk, %wv) {axis = -2}
            %b = concat(%bq, %bk, %bv) {axis = -1}
            %product = matmul(%x, %w) {transpose_b = true}
            %qkv = add(%product, %b)
        """
        + _SLICES,
        refuse=_refuse,
        seeds=_seeds,
    ),
    Rule(
        "qkv",
        before="""
            %q = matmul(%x, %wq) {transpose_b = true}
            %k = matmul(%x, %wk) {transpose_b = true}
            %v = matmul(%x, %wv) {transpose_b = true}
        """,
        after="""
            %w = concat(%wq, %wk, %wv) {axis = -2}
            %qkv = matmul(%x, %w) {transpose_b = true}
        """
        + _SLICES,
        refuse=_refuse,
        explain=always,
        seeds=_seeds,
    ),
)

FUSE_QKV = Pass("fuse_qkv", lambda graph, log: rewrite(graph, RULES, log))
