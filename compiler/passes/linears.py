"""What fuse_qkv and fuse_gated_mlp share: reasons why products on the same operand can't become one."""

from __future__ import annotations

from compiler.passes.pattern import Match


def why_not_joined(match: Match, weights: tuple[str, ...], biases: tuple[str, ...] = ()) -> str | None:
    """The reason why matrices `weights` [rows,M] and vectors `biases` can't be joined before the model runs, or None.

    Binds the holes `$w_stop` of each weight w: where its rows end.
    """
    stop = 0
    for name in (*weights, *biases):
        definition = match.scope.definition(match.values[name])
        if definition is None or definition.op not in ("weight", "concat", "const"):
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
    return None
