"""Where tensors come from (weights, constants, state), and `repeat`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compiler.ir.core import AttrValue
from compiler.ir.ops.registry import TypeRuleError, op
from compiler.ir.types import INTEGERS, Shape, TensorType


def _weight(declared: TensorType, *, name: str) -> tuple[TensorType, ...]:
    if not all(isinstance(dim, int) for dim in declared.shape):
        raise TypeRuleError(f"the dims of weight `{name}` must be numbers, got {declared}")
    return (declared,)


@op(" -> T[*N]", infer=_weight, source=True)
def weight(*, name: str) -> Any:
    """A parameter of the model; inside `repeat`, `{i}`, `{i+1}` or `{2*i+1}` in its name is the round's number."""
    raise NotImplementedError("the interpreter looks weights up")


@op(" -> T[*N]", source=True, effect=True)
def state(*, name: str) -> Any:
    """A buffer that lives between runs (a KV cache); its name is formed like a weight's."""
    raise NotImplementedError("the interpreter looks states up")


def _nested_shape(value: AttrValue) -> Shape:
    if not isinstance(value, tuple):
        return ()
    inner = {_nested_shape(item) for item in value}
    if len(inner) != 1:
        raise TypeRuleError("`const` takes a scalar or a rectangular nest of tuples")
    return (len(value), *inner.pop())


def _leaves(value: AttrValue) -> Iterator[AttrValue]:
    if not isinstance(value, tuple):
        yield value
        return
    for item in value:
        yield from _leaves(item)


def _const(declared: TensorType, *, value: AttrValue) -> tuple[TensorType, ...]:
    if _nested_shape(value) != declared.shape:
        raise TypeRuleError(f"the value of `const` is no {declared}")
    wanted = (int,) if declared.dtype in INTEGERS or declared.dtype == "bool" else (int, float)
    for leaf in _leaves(value):
        if not isinstance(leaf, wanted) or isinstance(leaf, bool) != (declared.dtype == "bool"):
            raise TypeRuleError(f"the value of `const` holds {leaf!r}, which is no {declared.dtype}")
    return (declared,)


@op(" -> T[*N]", infer=_const, source=True)
def const(*, value: Any) -> Any:
    """A small tensor written out in the graph, as nested tuples."""
    raise NotImplementedError("the interpreter makes constants, in the type that the equation states")


def _repeat(*carried: TensorType, count: int) -> tuple[TensorType, ...]:
    if count < 1:
        raise TypeRuleError(f"`repeat` {count} times")
    return carried


@op("carried: T[*N] -> T[*N]", infer=_repeat, variadic=True)
def repeat(*carried: Any, count: int) -> Any:
    """Run the body `count` times, each round's results carried into the next; values outside may be read inside."""
    raise NotImplementedError("the interpreter runs bodies")
