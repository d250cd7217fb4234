"""What ranks that share a model, each with a graph of its own, hand to each other; all of them do it together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from compiler.ir.ops.registry import TypeRuleError, op
from compiler.ir.types import Dim, TensorType

# Gives the values of all ranks, in their order, for that of one: compiler/ir/ranks.py sets it for each.
Swap = Callable[[Any], Sequence[Any]]
SWAP: ContextVar[Swap] = ContextVar("SWAP")


def _several(ranks: int) -> None:
    if ranks < 2:
        raise TypeRuleError(f"an exchange between {ranks} ranks")


def _all_reduce(x: TensorType, *, ranks: int) -> tuple[TensorType, ...]:
    _several(ranks)
    if not x.is_float:
        raise TypeRuleError(f"`all_reduce` adds up floats, got {x}")
    return (x,)


@op("x: F[*N] -> F[*N]", infer=_all_reduce)
def all_reduce(x: Any, *, ranks: int) -> Any:
    """The sum of what the `ranks` ranks have, added up in float32 and rounded once; the same on each."""
    given = SWAP.get()(x)
    if len(given) != ranks:
        raise TypeRuleError(f"{len(given)} ranks run a graph for {ranks}")
    total = given[0].float()
    for other in given[1:]:
        total = total + other.float()
    return total.to(x.dtype)


def _all_gather(x: TensorType, *, axis: int, ranks: int) -> tuple[TensorType, ...]:
    _several(ranks)
    size = x.shape[axis] if -x.rank <= axis < 0 else None
    if not isinstance(size, int):
        raise TypeRuleError(f"can't gather {x} along {axis}")
    shape: list[Dim] = list(x.shape)
    shape[axis] = ranks * size
    return (TensorType(x.dtype, tuple(shape)),)


@op("x: T[*N] -> T[*M]", infer=_all_gather)
def all_gather(x: Any, *, axis: int, ranks: int) -> Any:
    """What the `ranks` ranks have, one after the other along `axis` (negative); the same on each."""
    import torch

    given = SWAP.get()(x)
    if len(given) != ranks:
        raise TypeRuleError(f"{len(given)} ranks run a graph for {ranks}")
    return torch.cat(list(given), axis)
