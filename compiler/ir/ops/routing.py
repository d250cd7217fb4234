"""Choosing experts and multiplying with the chosen: what a mixture of experts is made of."""

from __future__ import annotations

from typing import Any

from compiler.ir.ops.registry import TypeRuleError, op
from compiler.ir.types import TensorType


def _top_k(x: TensorType, *, k: int) -> tuple[TensorType, ...]:
    size = x.shape[-1] if x.rank else None
    if not isinstance(size, int) or not 1 <= k <= size:
        raise TypeRuleError(f"can't take the {k} largest along the last dim of {x}")
    return (TensorType("i32", (*x.shape[:-1], k)),)


@op("x: F[*N,E] -> i32[*N,K]", infer=_top_k)
def top_k(x: Any, *, k: int) -> Any:
    """The places of the k largest along the last dim, largest first; of equals the first one comes first."""
    import torch

    return torch.sort(x, dim=-1, descending=True, stable=True).indices[..., :k].int()


@op("x: T[*N,E], index: I[*N,K] -> T[*N,K]")
def take(x: Any, index: Any) -> Any:
    """x[..., index[..., k]] for each row: `torch.take_along_dim` over the last dim; indices are in [0, E)."""
    return x.gather(-1, index.long())


def _check_gather_matmul(x: TensorType, weight: TensorType, index: TensorType) -> None:
    rows, chosen = x.shape[-2], index.shape[-1]
    if rows not in (1, chosen):
        raise TypeRuleError(f"{x} has {rows} rows for {chosen} chosen matrices of {weight}: it must be 1 or as many")


@op("x: F[*N,J,M], weight: F[E,O,M], index: I[*N,K] -> F[*N,K,O]", check=_check_gather_matmul)
def gather_matmul(x: Any, weight: Any, index: Any) -> Any:
    """Each token times the matrices that `index` names: y[..., k, :] = weight[index[..., k]] x[..., k, :].

    J is K, or 1 where all K products read one row. The grouped product of a mixture of experts (arXiv:2211.15841);
    only matrices that are named are read.
    """
    chosen = index.long()
    rows = x.expand(*chosen.shape, x.shape[-1])
    out = x.new_empty(*chosen.shape, weight.shape[1])
    for expert in chosen.unique().tolist():
        mine = chosen == expert
        out[mine] = rows[mine] @ weight[expert].T
    return out
