"""What fuse_qkv and fuse_gated_mlp share: reasons why products on the same operand can't become one."""

from __future__ import annotations

from compiler.ir.core import Equation
from compiler.passes.pattern import Match


def why_not_joined(match: Match, weights: tuple[str, ...], biases: tuple[str, ...] = ()) -> str | None:
    """The reason why matrices `weights` [rows,M] and vectors `biases` can't be joined before the model runs, or None.

    Binds the holes `$w_stop` of each weight w: where its rows end.
    """
    stop = 0
    kinds: dict[str, str] = {}
    for name in (*weights, *biases):
        definition = match.scope.definition(match.values[name])
        if definition is None or definition.op not in ("weight", "concat", "const", "dequantize", "slice"):
            what = "an input" if definition is None else f"computed by `{definition.op}`"
            return f"%{match.value(name).name} is no weight: it is {what}"
        rank = 2 if name in weights else 1
        if match.type(name).rank != rank:
            return f"%{match.value(name).name} is {match.type(name)}, not of rank {rank}"
        if name in weights:
            rows = match.type(name).shape[0]
            assert isinstance(rows, int)  # weights have no symbolic dims
            stop += rows
            match.holes[f"{name}_stop"] = stop
            kinds[name] = _kind(definition)
    if len(set(kinds.values())) > 1:
        return "they are stored unlike: " + ", ".join(f"%{match.value(name).name} {kinds[name]}" for name in weights)
    return next((why for name in weights if (why := _alone(match.scope.definition(match.values[name])))), None)


def _kind(definition: Equation) -> str:
    """How a weight is stored: equal for weights whose codes and scales can lie one below the other."""
    if definition.op != "dequantize":
        return "as it is"
    codes, scale, *more = definition.values
    block = definition.attr.get("block") or "whole rows"
    return f"in {codes.type.dtype}, scales of {scale.type.dtype} for {block}{' and zeros' if more else ''}"


def _alone(definition: Equation | None) -> str | None:
    """Why a quantized weight can't lie below another."""
    if definition is None or definition.op != "dequantize":
        return None
    if len(definition.args) > 3:
        return f"%{definition.result.name} has a scale for the whole weight beside those of its blocks"
    return None
