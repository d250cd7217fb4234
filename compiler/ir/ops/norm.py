"""Norms as one operation: what the fusion passes put in place of their equations."""

from __future__ import annotations

from typing import Any

from compiler.ir.ops.registry import op


@op("x: F[*N,M], weight: F[M] -> F[*N,M]")
def rms_norm(x: Any, weight: Any, *, eps: float) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467, eq. 4), the statistics in float32."""
    import torch

    wide = x.float()
    return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


@op("x: F[*N,M], weight?: F[M], bias?: F[M] -> F[*N,M]")
def layer_norm(x: Any, weight: Any = None, bias: Any = None, *, eps: float) -> Any:
    """(x - mean x) / sqrt(var x + eps) * weight + bias (arXiv:1607.06450, eq. 4), the statistics in float32."""
    import torch

    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = (centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)).to(x.dtype)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias
