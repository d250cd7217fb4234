"""Fuses the equations of RMS norm and layer norm into one operation each.

The gain may be any [M] expression, so `1 + weight` fuses too. Adding the residual in the same operation is left out:
see docs/decisions.md.
"""

from __future__ import annotations

from compiler.passes.pattern import Match
from compiler.passes.rewrite import Rule, always, rewrite
from compiler.passes.runner import Pass

_LAYER_NORM = """
    %mu = mean(%x)
    %c = sub(%x, %mu)
    %sq = mul(%c, %c)
    %v = mean(%sq)
    %ve = add(%v, $eps)
    %r = rsqrt(%ve)
    %n = mul(%c, %r)
"""
_GAIN = "    %y = mul(%n, %w)"


def _not_a_vector(match: Match) -> str | None:
    for name, what in (("w", "gain"), ("b", "bias")):
        if name in match.values and match.type(name).rank != 1:
            return f"the {what} %{match.value(name).name} is {match.type(name)}, not a vector"
    return None


# A layer norm holds the equations of an RMS norm of its centred values, so it comes first.
RULES = (
    Rule(
        "layer_norm_bias",
        before=_LAYER_NORM + _GAIN + "    %z = add(%y, %b)",
        after="%z = layer_norm(%x, %w, %b) {eps = $eps}",
        anchor="r",
        refuse=_not_a_vector,
    ),
    Rule(
        "layer_norm",
        before=_LAYER_NORM + _GAIN,
        after="%y = layer_norm(%x, %w) {eps = $eps}",
        anchor="r",
        refuse=_not_a_vector,
        explain=always,
    ),
    Rule("layer_norm_plain", before=_LAYER_NORM, after="%n = layer_norm(%x) {eps = $eps}", anchor="r"),
    Rule(
        "rms_norm",
        before="""
            %sq = mul(%x, %x)
            %ms = mean(%sq)
            %me = add(%ms, $eps)
            %r = rsqrt(%me)
            %n = mul(%x, %r)
            %y = mul(%n, %w)
        """,
        after="%y = rms_norm(%x, %w) {eps = $eps}",
        anchor="r",
        refuse=_not_a_vector,
        explain=always,
    ),
)

FUSE_NORM = Pass("fuse_norm", lambda graph, log: rewrite(graph, RULES, log))
