"""Rotary embedding and attention: what position and attention parts become, before and after the KV cache."""

from __future__ import annotations

from typing import Any

from compiler.ir.cache_rows import CODES, HEAD, from_rows, to_rows
from compiler.ir.ops.registry import TypeRuleError, op
from compiler.ir.types import TensorType


def _check_rotate(x: TensorType, cos: TensorType, sin: TensorType, *, style: str) -> None:  # noqa: ARG001
    dim, pairs = x.shape[-1], cos.shape[-1]
    if style not in ("half", "interleaved"):
        raise TypeRuleError(f"unknown style `{style}`; known: half, interleaved")
    if not isinstance(dim, int) or not isinstance(pairs, int) or 2 * pairs > dim:
        raise TypeRuleError(f"can't rotate {pairs} pairs of {dim} dims")


def check_heads(
    q: TensorType,
    k: TensorType,
    *_: Any,
    slopes: tuple[float, ...] | None = None,
    bf16_bias: float | None = None,
    **__: Any,
) -> None:
    """What q[..,H,D], k[..,K,D] and the attributes of an attention must agree on; raises TypeRuleError."""
    heads, groups = q.shape[-2], k.shape[-2]
    if not isinstance(heads, int) or not isinstance(groups, int) or heads % groups:
        raise TypeRuleError(f"{heads} query heads do not share {groups} key heads evenly")
    if slopes is not None and len(slopes) != heads:
        raise TypeRuleError(f"{len(slopes)} slopes for {heads} heads")
    if slopes is None and bf16_bias is not None:
        raise TypeRuleError("`bf16_bias` without slopes")


def _check_paged(
    q: TensorType, k: TensorType, v: TensorType, k_cache: TensorType, v_cache: TensorType, *rest: Any,
    codes: str | None = None, **attrs: Any,
) -> None:  # fmt: skip
    check_heads(q, k, v, *rest, **attrs)
    if codes is not None and codes not in CODES:
        raise TypeRuleError(f"a cache has codes of {', '.join(CODES)}, not {codes}")
    if codes is not None and k_cache.dtype != "u8":
        raise TypeRuleError(f"rows of codes are bytes, u8, got {k_cache.dtype}")
    for name, x, cache in (("k_cache", k, k_cache), ("v_cache", v, v_cache)):
        size, row = x.shape[-1], cache.shape[-1]
        wanted = size if codes is None or not isinstance(size, int) else size + HEAD
        if row != wanted:
            raise TypeRuleError(f"a row of `{name}` must have {wanted} elements, got {row}")


@op("x: F[*N,H,D], cos: f32[*N,R], sin: f32[*N,R] -> F[*N,H,D]", check=_check_rotate)
def rotate(x: Any, cos: Any, sin: Any, *, style: str) -> Any:
    """Rotary embedding (arXiv:2104.09864, eq. 34) of the first 2R of D dims, in float32; the rest pass through.

    Pairs are (j, j + R) in style `half` and (2j, 2j + 1) in style `interleaved`; (a, b) becomes
    (a cos - b sin, b cos + a sin).
    """
    import torch

    size = cos.shape[-1]
    wide, rest = x[..., : 2 * size].float(), x[..., 2 * size :]
    cos, sin = cos[..., None, :], sin[..., None, :]
    if style == "half":
        a, b = wide[..., :size], wide[..., size:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    else:
        a, b = wide[..., 0::2], wide[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), -1)


def attend(
    q: Any,
    k: Any,
    v: Any,
    query_at: Any,
    key_at: Any,
    prefix: Any,
    sinks: Any,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    slopes: tuple[float, ...] | None,
    bf16_bias: float | None,
) -> Any:
    """Attention of q[B,S,H,D] over k[B,P,K,D] and v[B,P,K,Dv] in float32; query_at[B,S] and key_at[B,P] are positions.

    scores = softcap(q k' scale) + slope key_at, masked; out = softmax(scores) v (arXiv:1706.03762, eq. 1; grouped
    heads arXiv:2305.13245; linear biases arXiv:2108.12409). A key at a position below 0 is padding.
    """
    import torch

    batch, length, heads, dim = q.shape
    groups = k.shape[2]
    q = q.float().reshape(batch, length, groups, heads // groups, dim).permute(0, 2, 3, 1, 4)
    k = k.float().permute(0, 2, 3, 1)[:, :, None]
    scores = (q @ k).mul_(scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    at, keys = query_at[:, None, None, :, None], key_at[:, None, None, None, :]
    if slopes is not None:
        table = torch.tensor(slopes).reshape(1, groups, -1, 1, 1)
        if bf16_bias is None:
            scores = scores + table * keys
        else:
            scores = scores + (table.bfloat16() * keys.bfloat16()).float() * bf16_bias
    mask = keys >= 0
    if causal:
        seen = keys <= at
        if prefix is not None:
            seen = seen | (keys < prefix[:, None, None, None, None])
        mask = mask & seen
    if window is not None:
        mask = mask & (at - keys < window)
    scores = scores.masked_fill_(~mask, torch.finfo(torch.float32).min)
    if sinks is not None:
        column = sinks.float().reshape(1, groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    out = weights @ v.float().permute(0, 2, 1, 3)[:, :, None]
    return out.permute(0, 3, 1, 2, 4).reshape(batch, length, heads, v.shape[-1])


@op(
    "q: F[B,S,H,D], k: F[B,S,K,D], v: F[B,S,K,E], positions: i32[B,S], prefix?: i32[B], sinks?: F[H] -> F[B,S,H,E]",
    check=check_heads,
)
def attention(
    q: Any,
    k: Any,
    v: Any,
    positions: Any,
    prefix: Any = None,
    sinks: Any = None,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    slopes: tuple[float, ...] | None = None,
    bf16_bias: float | None = None,
) -> Any:
    """Attention without a cache: every sequence is a row, `positions` below 0 are padding.

    K divides H: query head h reads key head h // (H/K). `causal` hides later keys, `window` w keys w or more back,
    `prefix` shows keys before it to all; `softcap` c is c tanh(s/c) before the mask; `slopes` are ALiBi's, times the
    key's position, with `bf16_bias` f in bfloat16 and then times f; `sinks` are logits that join each softmax and are
    dropped.
    """
    options: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
    options |= {"slopes": slopes, "bf16_bias": bf16_bias}
    return attend(q, k, v, positions, positions, prefix, sinks, **options).to(q.dtype)


@op(
    "q: F[*N,H,D], k: F[*N,K,D], v: F[*N,K,E], k_cache: T[C,K,W,X], v_cache: T[C,K,W,Y], past_lens: i32[B], "
    "seq_begins: i32[Z], block_ids: i32[P], block_begins: i32[Z], max_context: i32[], prefix?: i32[B], sinks?: F[H] "
    "-> F[*N,H,E]",
    check=_check_paged,
    effect=True,
)
def paged_attention(
    q: Any,
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    past_lens: Any,
    seq_begins: Any,
    block_ids: Any,
    block_begins: Any,
    max_context: Any,  # noqa: ARG001
    prefix: Any = None,
    sinks: Any = None,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    slopes: tuple[float, ...] | None = None,
    bf16_bias: float | None = None,
    codes: str | None = None,
) -> Any:
    """Append k and v to the paged cache, then attend to the whole sequence (arXiv:2309.06180, section 4.2).

    The leading dims are the packed tokens of B sequences, one after the other: sequence b has the tokens
    seq_begins[b]:seq_begins[b+1], follows past_lens[b] cached ones, and owns the cache blocks
    block_ids[block_begins[b]:block_begins[b+1]], W tokens each. max_context is the longest past + new length: kernels
    size buffers by it. Changes k_cache and v_cache in place. The attributes are those of `attention`. A row of a cache
    is the numbers of a token and head, X = D and Y = E; with `codes` u8 or f8e4m3 it is bytes, X = D + 8 and Y = E + 8:
    scale and zero in float32, then codes, and a number is (code - zero) scale. u8: scale = (max - min) / 255, at least
    1e-4 where that is 0, zero = -min / scale; f8e4m3: scale = max|x| / 448, at least 1e-12, zero = 0. Codes are
    rounded, ties to even. Attention is to what is in the cache, of new tokens too.
    """
    import torch

    heads, wide = q.shape[-2], v.shape[-1]
    flat_q, flat_k, flat_v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    out = flat_q.new_empty(flat_q.shape[0], heads, wide)
    size = k_cache.shape[2]
    options: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
    options |= {"slopes": slopes, "bf16_bias": bf16_bias}
    for row, past in enumerate(past_lens.tolist()):
        start, stop = int(seq_begins[row]), int(seq_begins[row + 1])
        blocks = block_ids[int(block_begins[row]) : int(block_begins[row + 1])].long()
        at = torch.arange(past, past + stop - start)
        for cache, x in ((k_cache, flat_k[start:stop]), (v_cache, flat_v[start:stop])):
            cache[blocks[at // size], :, at % size] = x.to(cache.dtype) if codes is None else to_rows(x, codes)
        keys_at = torch.arange(past + stop - start)
        keys = k_cache[blocks[keys_at // size], :, keys_at % size]
        values = v_cache[blocks[keys_at // size], :, keys_at % size]
        if codes is not None:
            keys, values = from_rows(keys, codes), from_rows(values, codes)
        before = None if prefix is None else prefix[row : row + 1]
        out[start:stop] = attend(
            flat_q[None, start:stop], keys[None], values[None], at[None], keys_at[None], before, sinks, **options
        )[0].to(out.dtype)
    return out.reshape(*q.shape[:-2], heads, wide)
