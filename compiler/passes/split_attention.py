"""Attention shared by ranks: by heads, each rank with the keys and values that its heads read."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import TYPE_CHECKING

from compiler.ir.core import Equation, Value
from compiler.passes.split_layouts import Held, MismatchError, Split
from specs.errors import SpecRTError

if TYPE_CHECKING:
    from compiler.passes.split_tensors import Splitter


def attention(ranks: Splitter, equation: Equation) -> None:
    """Heads are split, each with its keys and values; where those are fewer than ranks, several ranks hold copies."""
    q, k, v, *others = (ranks.settled(value) if value.name not in ranks.states else None for value in equation.values)
    assert q is not None
    assert k is not None
    assert v is not None
    within = [held.layout for held in (q, k, v) if isinstance(held.layout, Split) and held.layout.axis != -2]
    if within:
        raise MismatchError(within, "heads are split, not what is in them")
    if _parts(k) != _parts(v):
        unlike = [held.layout for held in (k, v) if isinstance(held.layout, Split)]
        raise MismatchError(unlike, "keys and values are split unlike each other", gcd(_parts(k), _parts(v)))
    heads, groups = (int(str(value.type.shape[-2])) for value in equation.values[:2])
    if _parts(q) != ranks.count or not _shared(heads, groups, ranks.count, _parts(k)):
        raise _not_shared(ranks, equation, heads, groups)
    values: list[Value] = [q.value, k.value, v.value]
    for value, held in zip(equation.values[3:], others, strict=True):
        if held is None:
            values.append(ranks.state(value, -3, _parts(k)))
        elif _is_sinks(equation, value):
            part = ranks.parts.of(value, -1, ranks.count)
            assert isinstance(part, Value), part  # one for each head, from weights
            values.append(part)
        else:
            values.append(held.value)
    slopes = equation.attr.get("slopes")
    attrs = dict(equation.attr)
    if isinstance(slopes, tuple):
        start, stop = ranks.parts.bounds(heads, ranks.count)
        attrs["slopes"] = slopes[start:stop]
    assert isinstance(q.layout, Split)
    ranks.emit(equation, values, q.layout, attrs)
    ranks.log.hit("heads" if _parts(k) == ranks.count else "heads_with_copies", equation.result.name, equation.where)


def _not_shared(ranks: Splitter, equation: Equation, heads: int, groups: int) -> SpecRTError:
    message, possible = (
        f"{ranks.count} GPUs can't share an attention of {_heads(heads, groups)} evenly",
        _possible(heads, groups),
    )
    hint = f"`tensor` can be {', '.join(map(str, possible))}; stages of a pipeline need no such number"
    if ranks.count in possible:  # then it is what lies between a product and the heads
        why = next(
            (ranks.reasons[name] for name in _sources(ranks, equation) if name in ranks.reasons), "it is not by heads"
        )
        message = f"{ranks.count} GPUs can't share an attention: {why}"
        hint = "stages of a pipeline can be made of it: `pipeline` in place of `tensor`"
    return SpecRTError("PASS-005", message, where=equation.where, hint=hint)


def _sources(ranks: Splitter, equation: Equation) -> Iterator[str]:
    """The products that queries, keys and values come from."""
    for value in equation.values[:3]:
        made = ranks.made.get(value.name)
        while made is not None and made.op != "matmul" and made.values:
            made = ranks.made.get(made.values[0].name)
        if made is not None:
            yield made.result.name


def _parts(held: Held) -> int:
    return held.layout.parts if isinstance(held.layout, Split) else 1


def _is_sinks(equation: Equation, value: Value) -> bool:
    return equation.args[-1] == value and value.type.is_float and value.type.rank == 1


def _heads(heads: int, groups: int) -> str:
    return f"{heads} heads" if heads == groups else f"{heads} heads, {groups} of keys and values,"


def _shared(heads: int, groups: int, ranks: int, parts: int) -> bool:
    """Whether each rank's heads read its own keys and values in equal groups."""
    if heads % ranks or groups % parts or (heads // ranks) % (groups // parts):
        return False
    each, own = heads // ranks, groups // parts
    return all(
        (rank * each + head) // (heads // groups) == rank * parts // ranks * own + head // (each // own)
        for rank in range(ranks)
        for head in range(each)
    )


def _possible(heads: int, groups: int) -> list[int]:
    return [count for count in range(1, heads + 1) if _shared(heads, groups, count, gcd(count, groups))]
