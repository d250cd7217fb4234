"""A spec in a line: what its published sizes have in common and where they differ, in a few words for tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specs.config import resolve_size
from specs.facts import Fact, facts
from specs.schema import Spec
from specs.wiring import SHORT

NONE = ("none", "no", "")


@dataclass(frozen=True)
class Summary:
    """Short texts, one value or several with `or`."""

    attention: str
    positions: str
    norms: str
    mlp: str


def summary(spec: Spec) -> Summary:
    """The summary over all sizes of a spec; one without sizes is told by its texts."""
    seen, extras = [], []
    envs: list[dict[str, Any] | None] = [resolve_size(spec, size) for size in spec.sizes]
    for env in envs or [None]:
        said = facts(spec, env)
        seen.append((_heads(said, env), _positions(said), _norm_kinds(said), _norm_places(said), _mlp(said)))
        extras.append(_extras(said))
    heads, positions, kinds, places, mlp = (" or ".join(dict.fromkeys(texts)) for texts in zip(*seen, strict=True))
    every = dict.fromkeys(extra for one in extras for extra in one)
    attention = [heads, *(extra if all(extra in one for one in extras) else f"{extra} in some" for extra in every)]
    return Summary(", ".join(filter(None, attention)), positions, f"{kinds}: {places}", mlp)


def _texts(said: list[Fact], group: str, what: str) -> list[str]:
    """The texts of one fact over all parts of a group (`attention 1`, `attention 2`), without those that say no."""
    found = (fact.text for fact in said if fact.group.rstrip(" 0123456789") == group and fact.what == what)
    return [text for text in dict.fromkeys(found) if text not in NONE]


def _heads(said: list[Fact], env: Mapping[str, Any] | None) -> str:
    heads, kv_heads = ((env or {}).get(name) for name in ("heads", "kv_heads"))
    words = [mask for mask in _texts(said, "attention", "mask") if mask != "causal"]
    words += _texts(said, "attention", "kind")
    if isinstance(heads, int) and isinstance(kv_heads, int):
        words.append("multi-head" if heads == kv_heads else "multi-query" if kv_heads == 1 else "grouped")
    return ", ".join(words)


def _extras(said: list[Fact]) -> list[str]:
    named = {
        "window": "window",
        "cap of the scores": "capped",
        "norm of queries and keys": "q and k norms",
        "sink logits": "sinks",
    }
    return [word for what, word in named.items() if _texts(said, "attention", what)]


def _positions(said: list[Fact]) -> str:
    looked_up = {fact.group.removeprefix("embedding of ") for fact in said if fact.group.startswith("embedding of ")}
    words = ["learned"] if looked_up - {"tokens", "token_types"} else []
    for kind in _texts(said, "attention", "positions"):
        pairs = [pair for pair in _texts(said, "attention", "rotary pairs") if pair != "half"]
        dims, width = _texts(said, "attention", "rotated dims"), _texts(said, "sizes", "head width")
        partial = ["partial"] if dims and width and dims != width else []
        words.append(" ".join([kind, *(f"({text})" for text in [", ".join([*partial, *pairs])] if text)]))
    return ", ".join(words) or "none"


def _norm_kinds(said: list[Fact]) -> str:
    return " and ".join(text.removesuffix(" norm") for text in _texts(said, "norms", "kind")) or "none"


def _norm_places(said: list[Fact]) -> str:
    layer = next((fact.text for fact in said if fact.what == "a layer"), "")
    return SHORT.get(layer, "in an order of its own")


def _mlp(said: list[Fact]) -> str:
    words = []
    for group in dict.fromkeys(fact.group for fact in said if fact.group.startswith(("MLP", "experts"))):
        mine = {fact.what: fact.text for fact in said if fact.group == group}
        gated = "gated " if mine.get("kind", "").startswith("gated") else ""
        if group.startswith("experts"):
            words.append(f"experts ({' '.join([mine.get('expert', ''), mine.get('expert act', '')]).strip()})")
        else:
            words.append(gated + mine.get("activation", ""))
    return " and ".join(dict.fromkeys(words)) or "none"
