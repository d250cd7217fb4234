"""Attention of many packed tokens over the paged cache: flash attention (arXiv:2307.08691), any past allowed.

On sm_90 compiler/kernels/prefill_hopper.py has what most models ask for; this has everything, on all architectures.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compiler.kernels.overlap import wait
from compiler.kernels.softmax import FAR, LOG2E, over_tile


@triton.jit
def _span(
    q, whole, at, head, top, total, out, low, high, k_cache, v_cache, block_ids, begin, context, before, slopes, group,
    groups: tl.constexpr, dim: tl.constexpr, wide: tl.constexpr, block: tl.constexpr, scale: tl.constexpr,
    causal: tl.constexpr, window: tl.constexpr, softcap: tl.constexpr, bf16_bias: tl.constexpr, codes: tl.constexpr,
    tile: tl.constexpr, dim_span: tl.constexpr, wide_span: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Key tiles low..high-1 of one query tile."""
    for index in range(low, high):
        top, total, out = over_tile(
            q, whole, at, head, top, total, out, index, k_cache, v_cache, block_ids, begin, context, before, slopes,
            group, groups, dim, wide, block, scale, causal, window, softcap, bf16_bias, codes, tile, dim_span,
            wide_span, masked,
        )  # fmt: skip
    return top, total, out


@triton.jit
def prefill(
    q, k_cache, v_cache, out, past_lens, seq_begins, block_ids, block_begins, tile_rows, tile_starts,
    prefix, sinks, slopes,
    q_row: tl.constexpr, q_head: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr,
    wide: tl.constexpr, block: tl.constexpr, scale: tl.constexpr, causal: tl.constexpr, window: tl.constexpr,
    softcap: tl.constexpr, bf16_bias: tl.constexpr, codes: tl.constexpr, rows: tl.constexpr,
    tile: tl.constexpr, dim_span: tl.constexpr, wide_span: tl.constexpr, overlap: tl.constexpr = False,
):  # fmt: skip
    """Grid (H, query tiles): tile i has the tokens tile_starts[i].. of sequence tile_rows[i]; out is [T, H, E].

    k and v of the tokens are in the cache already. A tile whose row is below 0 is padding.
    """
    head = tl.program_id(0)
    index = tl.program_id(1)
    row = tl.load(tile_rows + index)
    wait(overlap)
    if row < 0:
        return
    start = tl.load(tile_starts + index)
    past = tl.load(past_lens + row)
    first_token = tl.load(seq_begins + row)
    count = tl.load(seq_begins + row + 1) - first_token
    begin = tl.load(block_begins + row)
    context = past + count
    group = head // (heads // groups)
    place = start + tl.arange(0, rows)
    at = (past + place)[:, None]
    token = (first_token + place).to(tl.int64)
    ok = place < count
    d, e = tl.arange(0, dim_span), tl.arange(0, wide_span)
    where = q + token[:, None] * q_row + head * q_head + d[None, :]
    x = tl.load(where, mask=ok[:, None] & (d < dim)[None, :], other=0.0)
    whole = tl.sum(x.to(tl.float32), 1)
    head_of = tl.full([rows], 0, tl.int32) + head
    if sinks is not None:
        top = tl.full([rows], 0.0, tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
        total = tl.full([rows], 1.0, tl.float32)
    else:
        top = tl.full([rows], FAR, tl.float32)
        total = tl.full([rows], 0.0, tl.float32)
    acc = tl.zeros([rows, wide_span], tl.float32)
    last = tl.minimum(past + start + rows, context)  # one behind the last position of this tile
    stop = context
    clear = context // tile  # key tiles below are seen by every query, as far as the context and causality go
    before = None
    if prefix is not None:
        before = tl.load(prefix + row)
    if causal:
        stop = last
        clear = (past + start + 1) // tile
        if prefix is not None:
            stop = tl.maximum(stop, tl.minimum(before, context))
    low = 0
    clear_low = 0
    if window is not None:
        low = tl.maximum(past + start - window + 1, 0) // tile
        clear_low = tl.maximum(last - window + tile - 1, 0) // tile
    high = tl.cdiv(stop, tile)
    clear_low = tl.minimum(tl.maximum(clear_low, low), high)
    clear = tl.minimum(tl.maximum(clear, clear_low), high)
    if window is not None:
        top, total, acc = _span(
            x, whole, at, head_of, top, total, acc, low, clear_low, k_cache, v_cache, block_ids, begin, context, before,
            slopes, group, groups, dim, wide, block, scale, causal, window, softcap, bf16_bias, codes, tile, dim_span,
            wide_span, True,
        )  # fmt: skip
    top, total, acc = _span(
        x, whole, at, head_of, top, total, acc, clear_low, clear, k_cache, v_cache, block_ids, begin, context, before,
        slopes, group, groups, dim, wide, block, scale, causal, window, softcap, bf16_bias, codes, tile, dim_span,
        wide_span, False,
    )  # fmt: skip
    top, total, acc = _span(
        x, whole, at, head_of, top, total, acc, clear, high, k_cache, v_cache, block_ids, begin, context, before,
        slopes, group, groups, dim, wide, block, scale, causal, window, softcap, bf16_bias, codes, tile, dim_span,
        wide_span, True,
    )  # fmt: skip
    y = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (token[:, None] * heads + head) * wide + e[None, :], y, mask=ok[:, None] & (e < wide)[None, :])
