"""How positions enter, as far as tensors and config.json tell."""

from __future__ import annotations

from dataclasses import dataclass, field

from compiler.infer.hints import Hints
from compiler.infer.keys import Keys
from compiler.infer.page import number_text
from compiler.infer.structure import Found

_THETA = number_text(10000.0)


@dataclass
class Position:
    """The fields of `position`, those of a table of positions where there is one, and what to check of either."""

    fields: str
    checks: list[str] = field(default_factory=list)
    table: str = ""


def position_of(found: Found, hints: Hints, keys: Keys) -> Position:
    """Learned where there is a table, ALiBi where a key says so, else rotary."""
    table = found.roles.get("positions")
    if table is not None:
        return _learned((table.weight or (0,))[0], keys)
    alibi = next((key for key in hints.alibi if keys.value(key) is True), None)
    if alibi is not None:
        keys.require[keys.read(alibi)] = True
        return Position("kind: alibi, scaled: false", ["whether the bias is added before the scores are scaled"])
    return _rotary(hints, keys)


def _learned(rows: int, keys: Keys) -> Position:
    key = keys.first("context")
    extra = rows - keys.config[key] if key is not None else 0
    if key is None:
        return Position("kind: none", table=f"rows: {rows}")
    if extra == 0:
        return Position("kind: none", table="rows: context")
    check = f"the table has {rows} rows, `{key}` is {keys.config[key]}: which row is position 0"
    offset = f", offset: {extra}" if extra > 0 else ""
    return Position("kind: none", [check], f"rows: {f'context + {extra}' if extra > 0 else rows}{offset}")


def _rotary(hints: Hints, keys: Keys) -> Position:
    checks = ["rotary style: `half` pairs i with i + dims/2, `interleaved` 2i with 2i + 1"]
    mappings = [key for key in hints.rope["mappings"] if isinstance(keys.config.get(key), dict)]

    def paths(name: str) -> list[str]:
        places = [f"{mapping}.{key}" for mapping in mappings for key in hints.rope[name]]
        return [keys.read(path) for path in (*places, *hints.rope[name]) if keys.has(path)]

    theta = paths("theta")
    keys.fixed("theta", " | ".join(theta) or _THETA)
    if not theta:
        told = "config.json gives no rotary base" if mappings else "nothing tells how positions enter: rotary"
        checks.append(f"{told}; {_THETA} is only the commonest base")
    dims, fraction, rotated = "d_head", paths("fraction"), paths("dims")
    if rotated:
        keys.fixed("rotary_dims", " | ".join(rotated))
        dims = "rotary_dims"
    elif fraction:
        keys.fixed("rotated", " | ".join(fraction))
        dims = "int(d_head * rotated)"
    scaling = ""
    if mappings:
        keys.fixed("rope_scaling", " | ".join([*(keys.read(mapping) for mapping in mappings), "none"]))
        scaling = ", scaling: rope_scaling" + (", context: context" if keys.first("context") else "")
    return Position(f"kind: rope, style: half, dims: {dims}, theta: theta{scaling}", checks)
