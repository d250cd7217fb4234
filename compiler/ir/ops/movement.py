"""Operations that move or view elements and compute nothing. Axes count from the end: leading dims can be packed."""

from __future__ import annotations

from math import prod
from typing import Any

from compiler.ir.ops.registry import TypeRuleError, op
from compiler.ir.types import Dim, Shape, TensorType


def _reshape(x: TensorType, *, shape: Shape) -> tuple[TensorType, ...]:
    def parts(dims: Shape) -> tuple[int, list[str]]:
        return prod(dim for dim in dims if isinstance(dim, int)), sorted(dim for dim in dims if isinstance(dim, str))

    if parts(x.shape) != parts(shape):
        raise TypeRuleError(f"can't reshape {x} to [{','.join(map(str, shape))}]: element counts differ")
    return (TensorType(x.dtype, shape),)


@op("x: T[*N] -> T[*M]", infer=_reshape)
def reshape(x: Any, *, shape: Shape) -> Any:
    """x with the same elements in row-major order under another shape; symbolic dims keep their order."""
    return x.reshape(shape)  # the interpreter has put numbers in place of names


def _transpose(x: TensorType, *, axes: tuple[int, ...]) -> tuple[TensorType, ...]:
    if sorted(axes) != list(range(-len(axes), 0)) or len(axes) > x.rank:
        raise TypeRuleError(f"axes {axes} are no permutation of the last {len(axes)} dims of {x}")
    head = x.shape[: x.rank - len(axes)]
    return (TensorType(x.dtype, (*head, *(x.shape[axis] for axis in axes))),)


@op("x: T[*N] -> T[*M]", infer=_transpose)
def transpose(x: Any, *, axes: tuple[int, ...]) -> Any:
    """x with its last len(axes) dims permuted: new dim j is old dim axes[j], all counted from the end."""
    return x.permute(*range(x.ndim - len(axes)), *(axis % x.ndim for axis in axes))


def _concat(*xs: TensorType, axis: int) -> tuple[TensorType, ...]:
    first = xs[0]
    if not -first.rank <= axis < 0:
        raise TypeRuleError(f"axis {axis} is outside of {first}")
    total = 0
    for x in xs:
        size = x.shape[axis]
        if not isinstance(size, int):
            raise TypeRuleError(f"`concat` along the symbolic dim `{size}`")
        if x.dtype != first.dtype or _without(x, axis) != _without(first, axis):
            raise TypeRuleError(f"can't concatenate {first} and {x} along {axis}")
        total += size
    shape: list[Dim] = list(first.shape)
    shape[axis] = total
    return (TensorType(first.dtype, tuple(shape)),)


def _without(x: TensorType, axis: int) -> tuple[int, Shape, Shape]:
    axis %= max(x.rank, 1)
    return x.rank, x.shape[:axis], x.shape[axis + 1 :]


@op("xs: T[*N] -> T[*M]", infer=_concat, variadic=True)
def concat(*xs: Any, axis: int) -> Any:
    """The operands one after the other along `axis` (negative)."""
    import torch

    return torch.cat(xs, axis)


def _slice(x: TensorType, *, axis: int, start: int, stop: int) -> tuple[TensorType, ...]:
    size = x.shape[axis] if -x.rank <= axis < 0 else None
    first = isinstance(size, str) and (start, stop) == (0, 1)  # a symbolic dim has at least one element
    if not first and not (isinstance(size, int) and 0 <= start < stop <= size):
        raise TypeRuleError(f"can't take {start}:{stop} of axis {axis} of {x}")
    shape: list[Dim] = list(x.shape)
    shape[axis] = stop - start
    return (TensorType(x.dtype, tuple(shape)),)


@op("x: T[*N] -> T[*M]", infer=_slice)
def slice_(x: Any, *, axis: int, start: int, stop: int) -> Any:
    """Elements start:stop along `axis` (negative)."""
    return x.narrow(axis, start, stop - start)
