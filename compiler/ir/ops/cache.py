"""A linear KV cache: one row of places for each sequence, [B,K,C,D]. Attention over it, and what is written to it.

Its last place is never written and holds zeros: it has one place more than the longest sequence, or several.
"""

from __future__ import annotations

from typing import Any

from compiler.ir.ops.attention import attend, check_heads
from compiler.ir.ops.registry import op
from compiler.ir.types import TensorType


@op("cache: T[B,K,C,D], new: T[B,S,K,D], past_lens: i32[B] -> T[B,K,C,D]", effect=True)
def update_cache(cache: Any, new: Any, past_lens: Any) -> Any:
    """Write new keys or values to the places from past_lens[b] on of each sequence b, in place; gives the cache.

    past_lens[b] + S is less than C. Whoever attends reads this result, never the cache from before.
    """
    for row, past in enumerate(past_lens.tolist()):
        cache[row, :, past : past + new.shape[1]] = new[row].transpose(0, 1)
    return cache


def _check(q: TensorType, k: TensorType, *_: Any, **attrs: Any) -> None:
    batch, heads, places, dim = k.shape
    check_heads(q, TensorType(k.dtype, (batch, places, heads, dim)), **attrs)


@op(
    "q: F[B,S,H,D], k: F[B,K,C,D], v: F[B,K,C,E], positions: i32[B,S], prefix?: i32[B], sinks?: F[H] -> F[B,S,H,E]",
    check=_check,
)
def cached_attention(
    q: Any,
    k: Any,
    v: Any,
    positions: Any,
    prefix: Any = None,
    sinks: Any = None,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    slopes: tuple[float, ...] | None = None,
    bf16_bias: float | None = None,
) -> Any:
    """Causal attention of the tokens at `positions` over a linear cache that holds their keys and values already.

    Place c of the cache is position c, and what was never written is not seen. The attributes are those of `attention`.
    """
    import torch

    at = torch.arange(k.shape[2]).repeat(k.shape[0], 1)
    options: dict[str, Any] = {"scale": scale, "causal": True, "window": window, "softcap": softcap}
    options |= {"slopes": slopes, "bf16_bias": bf16_bias}
    keys, values = (x.transpose(1, 2) for x in (k, v))
    return attend(q, keys, values, positions, at, prefix, sinks, **options).to(q.dtype)
