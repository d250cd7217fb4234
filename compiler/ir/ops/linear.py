"""Matrix products, lookups and reductions."""

from __future__ import annotations

from typing import Any

from compiler.ir.ops.registry import TypeRuleError, broadcast, op
from compiler.ir.types import INTEGERS, TensorType


def _matmul(a: TensorType, b: TensorType, *, transpose_b: bool = False) -> tuple[TensorType, ...]:
    if a.dtype != b.dtype or not a.is_float:
        raise TypeRuleError(f"`matmul` takes two tensors of one float type, got {a.dtype} and {b.dtype}")
    if a.rank < 2 or b.rank < 2:
        raise TypeRuleError(f"`matmul` takes ranks of 2 and more, got {a} and {b}")
    inner, columns = (b.shape[-1], b.shape[-2]) if transpose_b else (b.shape[-2], b.shape[-1])
    if a.shape[-1] != inner:
        raise TypeRuleError(f"inner dims differ: {a} by {b}{' transposed' if transpose_b else ''}")
    return (TensorType(a.dtype, (*broadcast(a.shape[:-2], b.shape[:-2]), a.shape[-2], columns)),)


@op("a: F[*N,I,J], b: F[*N,J,K] -> F[*N,I,K]", infer=_matmul)
def matmul(a: Any, b: Any, *, transpose_b: bool = False) -> Any:
    """a b over the last two dims, the others broadcast; `transpose_b` reads b as [*N,K,J]: [out, in]."""
    return a @ (b.transpose(-1, -2) if transpose_b else b)


def _gather(table: TensorType, index: TensorType, *, dims: int = 1) -> tuple[TensorType, ...]:
    if index.dtype not in INTEGERS or not 1 <= dims <= table.rank:
        raise TypeRuleError(f"`gather` takes a table of {dims} dims or more and integers, got {table} and {index}")
    return (TensorType(table.dtype, (*index.shape, *table.shape[dims:])),)


@op("table: T[V,*M], index: I[*N] -> T[*N,*M]", infer=_gather)
def gather(table: Any, index: Any, *, dims: int = 1) -> Any:
    """The rows of `table` that `index` names; indices are in [0, V), V the product of the first `dims` dims."""
    return table.flatten(0, dims - 1)[index.long()]


def _reduce(x: TensorType) -> tuple[TensorType, ...]:
    if x.rank < 1:
        raise TypeRuleError("reduction of a scalar")
    return (TensorType(x.dtype, (*x.shape[:-1], 1)),)


@op("x: F[*N,M] -> F[*N,1]", infer=_reduce)
def mean(x: Any) -> Any:
    """Mean over the last dim, kept as 1."""
    return x.mean(-1, keepdim=True)


@op("x: F[*N,M] -> F[*N,1]", infer=_reduce)
def sum_(x: Any) -> Any:
    """Sum over the last dim, kept as 1."""
    return x.sum(-1, keepdim=True)


def _softmax(x: TensorType, sink: TensorType | None = None) -> tuple[TensorType, ...]:
    if x.rank < 1:
        raise TypeRuleError("softmax of a scalar")
    if sink is not None:
        rows = (*x.shape[:-1], 1)
        if sink.dtype != x.dtype or sink.shape[-1:] != (1,) or broadcast(sink.shape, rows) != rows:
            raise TypeRuleError(f"the sink {sink} is no logit for each row of {x}")
    return (x,)


@op("x: F[*N,M], sink?: F[*K,1] -> F[*N,M]", infer=_softmax)
def softmax(x: Any, sink: Any = None) -> Any:
    """exp(x - max x) / sum exp(x - max x) over the last dim, computed in float32.

    `sink` is one more logit for each row (broadcast), which joins the softmax and is dropped (arXiv:2309.17453).
    """
    import torch

    wide = x.float()
    if sink is None:
        return torch.softmax(wide, -1).to(x.dtype)
    column = sink.float().expand(*wide.shape[:-1], 1)
    return torch.softmax(torch.cat((wide, column), -1), -1)[..., :-1].to(x.dtype)
