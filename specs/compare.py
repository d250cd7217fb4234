"""How two architectures differ: their facts side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from specs.errors import SpecRTError
from specs.facts import Fact, facts
from specs.schema import Spec
from specs.wording import FROM_CONFIG

ORDER = ("wiring", "embedding", "attention", "latent", "MLP", "experts", "norms", "head", "checkpoint", "sizes")
ABSENT_TEXTS = ("no", "none", "0")


@dataclass(frozen=True)
class Side:
    """One of two things to compare: its name, its spec, and the values of its names where a size tells them."""

    name: str
    spec: Spec
    env: Mapping[str, Any] | None
    parameters: int | None


@dataclass(frozen=True)
class Difference:
    """One line; None where a side has nothing of the kind."""

    group: str
    what: str
    a: str | None
    b: str | None


def side(source: str) -> Side:
    """An architecture file, `file.yaml:size`, or a checkpoint folder; raises SPEC-067 for none of these."""
    from specs.checkpoint import Checkpoint
    from specs.config import resolve_config, resolve_size
    from specs.match import match_spec
    from specs.schema import load_spec

    path, size = Path(source), None
    if not path.exists() and ":" in source:
        file, _, size = source.rpartition(":")
        path = Path(file)
    if path.is_dir() and size is None:
        checkpoint = Checkpoint.open(path)
        spec = match_spec(checkpoint.config, where=checkpoint.config_where)
        env = resolve_config(spec, checkpoint.config, checkpoint.config_where)
        count = sum(prod(tensor.shape) for tensor in checkpoint.tensors.values())
        return Side(path.resolve().name, spec, env, count)
    if not path.is_file():
        hint = "give an architecture file (specs/models/*.yaml), `file.yaml:size`, or a checkpoint folder"
        raise SpecRTError("SPEC-067", f"`{source}` does not exist", hint=hint)
    spec = load_spec(path)
    if size is None:
        return Side(spec.name, spec, None, None)
    return Side(f"{spec.name}:{size}", spec, resolve_size(spec, size), spec.sizes[size].parameters)


def compare(a: Side, b: Side) -> tuple[list[Difference], list[Fact]]:
    """The differences, and the facts that are the same. Values are compared only where both sides have them."""
    both = a.env is not None and b.env is not None
    ours, theirs = (
        {(fact.group, fact.what): fact for fact in facts(one.spec, one.env if both else None, one.parameters)}
        for one in (a, b)
    )
    mine, others = ({group for group, _ in one} for one in (ours, theirs))
    same: list[Fact] = []
    differences: dict[tuple[str, str], Difference] = {}
    for key in dict.fromkeys([*ours, *theirs]):
        group, what = key
        left, right = ours.get(key), theirs.get(key)
        if left is not None and right is not None and _alike(left.text, right.text):
            same.append(left)
        elif group not in mine & others:  # only one side has such a part: said in one line
            mine_all = [fact for fact in (ours | theirs).values() if fact.group == group]
            text = ", ".join(f"{fact.what} {fact.text}" for fact in mine_all if fact.text not in ABSENT_TEXTS) or "yes"
            differences[group, ""] = Difference(group, "", text if left else "none", text if right else "none")
        elif group != "checkpoint" or (left and right):  # how absent parts are not stored is no news
            differences[key] = Difference(group, what, left.text if left else None, right.text if right else None)
    return sorted(_with_details(differences, {**ours, **theirs}), key=_rank), same


def _rank(one: Difference) -> int:
    """Groups in one order whatever the specs', details as they come."""
    return next((index for index, word in enumerate(ORDER) if one.group.startswith(word)), ORDER.index("norms"))


def _alike(a: str, b: str) -> bool:
    """Whether two texts say the same; that one spec also has a default for a key is no difference."""
    short, long = sorted((a, b), key=len)
    return a == b or (short == FROM_CONFIG and long.startswith(f"{FROM_CONFIG}, else "))


def _with_details(
    differences: Mapping[tuple[str, str], Difference], facts_: Mapping[tuple[str, str], Fact]
) -> list[Difference]:
    """What only one side can have, because the fact that it details differs, is told with that fact."""
    kept = dict(differences)
    for key, one in differences.items():
        parent = None if key not in facts_ or facts_[key].of is None else (one.group, str(facts_[key].of))
        if parent not in kept or parent is None or (one.a is not None and one.b is not None):
            continue
        whole, what = kept[parent], one.what.removeprefix("rotary ").removeprefix("position ")
        kept[parent] = Difference(
            whole.group,
            whole.what,
            f"{whole.a}, {what} {one.a}" if one.a is not None else whole.a,
            f"{whole.b}, {what} {one.b}" if one.b is not None else whole.b,
        )
        del kept[key]
    return list(kept.values())
