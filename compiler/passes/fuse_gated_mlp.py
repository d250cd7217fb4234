"""Joins the gate and up products of a gated MLP: one product with both weights, [2F,M], and two slices of its result.

Slices instead of an operation of its own: every backend has them, and the activation stays any activation.
"""

from __future__ import annotations

from compiler.ir.core import Equation
from compiler.passes.linears import why_not_joined
from compiler.passes.pattern import Match, Miss
from compiler.passes.rewrite import Rule, rewrite
from compiler.passes.runner import Pass

_ACTIVATIONS = (
    ("silu", "%a = silu(%g)"),
    ("gelu", "%a = gelu(%g) {approximate = $approximate}"),
    ("relu", "%a = relu(%g)"),
    ("sigmoid", "%a = sigmoid(%g)"),
    ("tanh", "%a = tanh(%g)"),
)
_SLICES = """
    %g = slice(%joined) {axis = -1, start = 0, stop = $wg_stop}
    %u = slice(%joined) {axis = -1, start = $wg_stop, stop = $wu_stop}
"""


def _refuse(match: Match) -> str | None:
    return why_not_joined(match, ("wg", "wu"), ("bg", "bu") if "bg" in match.values else ())


def _after_a_product(activation: Equation, miss: Miss) -> bool:  # noqa: ARG001 -- the signature of `explain`
    return miss.depth > 1  # more than the activation itself: any other use of one is no MLP


def _rules(name: str, activation: str) -> tuple[Rule, Rule]:
    with_bias = Rule(
        f"gated_{name}_bias",
        before=f"""
            %g0 = matmul(%x, %wg) {{transpose_b = true}}
            %g = add(%g0, %bg)
            %u0 = matmul(%x, %wu) {{transpose_b = true}}
            %u = add(%u0, %bu)
            {activation}
            %h = mul(%a, %u)
        """,
        after=f"""
            %w = concat(%wg, %wu) {{axis = -2}}
            %b = concat(%bg, %bu) {{axis = -1}}
            %product = matmul(%x, %w) {{transpose_b = true}}
            %joined = add(%product, %b)
            {_SLICES}
            {activation}
            %h = mul(%a, %u)
        """,
        anchor="a",
        refuse=_refuse,
        explain=_after_a_product,
    )
    plain = Rule(
        f"gated_{name}",
        before=f"""
            %g = matmul(%x, %wg) {{transpose_b = true}}
            %u = matmul(%x, %wu) {{transpose_b = true}}
            {activation}
            %h = mul(%a, %u)
        """,
        after=f"""
            %w = concat(%wg, %wu) {{axis = -2}}
            %joined = matmul(%x, %w) {{transpose_b = true}}
            {_SLICES}
            {activation}
            %h = mul(%a, %u)
        """,
        anchor="a",
        refuse=_refuse,
        explain=_after_a_product,
    )
    return with_bias, plain


RULES = tuple(rule for name, activation in _ACTIVATIONS for rule in _rules(name, activation))

FUSE_GATED_MLP = Pass("fuse_gated_mlp", lambda graph, log: rewrite(graph, RULES, log))
