"""Attention of one new token a sequence over the paged cache: split over the keys (flash decoding), then joined.

The query heads of a key head are rows of one tile, so that each block of the cache is read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compiler.kernels.overlap import wait
from compiler.kernels.softmax import FAR, LOG2E, over_tile


@triton.jit
def decode(
    q, k_cache, v_cache, out, parts, tops, past_lens, block_ids, block_begins, prefix, sinks, slopes,
    q_row: tl.constexpr, q_head: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr,
    wide: tl.constexpr, block: tl.constexpr, scale: tl.constexpr, causal: tl.constexpr, window: tl.constexpr,
    softcap: tl.constexpr, bf16_bias: tl.constexpr, codes: tl.constexpr, splits: tl.constexpr, rows: tl.constexpr,
    tile: tl.constexpr, dim_span: tl.constexpr, wide_span: tl.constexpr, overlap: tl.constexpr = False,
):  # fmt: skip
    """Grid (B, K, splits): token b is the only new one of sequence b, past_lens[b] below 0 is padding.

    With one split out [T, H, E] is written; else parts f32[B, H, splits, E] and tops f32[2, B, H, splits] for `join`.
    """
    row = tl.program_id(0)
    group = tl.program_id(1)
    split = tl.program_id(2)
    past = tl.load(past_lens + row)
    context = past + 1
    begin = tl.load(block_begins + row)
    low = 0
    if window is not None:
        low = tl.maximum(context - window, 0) // tile
    high = tl.cdiv(context, tile)
    each = tl.cdiv(high - low, splits)
    low += split * each
    high = tl.minimum(low + each, high)
    wait(overlap)
    before = None
    if prefix is not None:
        before = tl.load(prefix + row)
    share: tl.constexpr = heads // groups
    member = tl.arange(0, rows)
    ok = member < share
    head = group * share + tl.where(ok, member, 0)
    d, e = tl.arange(0, dim_span), tl.arange(0, wide_span)
    where = q + row.to(tl.int64) * q_row + head[:, None] * q_head + d[None, :]
    x = tl.load(where, mask=ok[:, None] & (d < dim)[None, :], other=0.0)
    whole = tl.sum(x.to(tl.float32), 1)
    top = tl.full([rows], FAR, tl.float32)
    total = tl.full([rows], 0.0, tl.float32)
    if sinks is not None:  # noqa: SIM102 - decided when compiled, the next one on the GPU
        if split == 0:
            top = tl.load(sinks + head).to(tl.float32) * LOG2E
            total = tl.full([rows], 1.0, tl.float32)
    acc = tl.zeros([rows, wide_span], tl.float32)
    for index in range(low, high):
        top, total, acc = over_tile(
            x, whole, past, head, top, total, acc, index, k_cache, v_cache, block_ids, begin, context, before, slopes,
            group, groups, dim, wide, block, scale, causal, window, softcap, bf16_bias, codes, tile, dim_span,
            wide_span, True,
        )  # fmt: skip
    lane = row.to(tl.int64) * heads + head
    inside = ok[:, None] & (e < wide)[None, :]
    if splits == 1:
        y = acc / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(out + lane[:, None] * wide + e[None, :], y.to(out.dtype.element_ty), mask=inside)
    else:
        lane = lane * splits + split
        tl.store(parts + lane[:, None] * wide + e[None, :], acc, mask=inside)
        tl.store(tops + lane, top, mask=ok)
        tl.store(tops + tl.num_programs(0).to(tl.int64) * heads * splits + lane, total, mask=ok)


@triton.jit
def join(
    parts, tops, out, heads: tl.constexpr, wide: tl.constexpr, splits: tl.constexpr, wide_span: tl.constexpr,
    split_span: tl.constexpr, overlap: tl.constexpr = False,
):  # fmt: skip
    """Grid (B, H): out [B, H, E] from the splits of `decode`."""
    wait(overlap)
    lane = tl.program_id(0).to(tl.int64) * heads + tl.program_id(1)
    lanes = tl.num_programs(0).to(tl.int64) * heads * splits
    split, e = tl.arange(0, split_span), tl.arange(0, wide_span)
    top = tl.load(tops + lane * splits + split, mask=split < splits, other=FAR)
    total = tl.load(tops + lanes + lane * splits + split, mask=split < splits, other=0.0)
    weight = tl.exp2(top - tl.max(top, 0))
    inside = (split < splits)[:, None] & (e < wide)[None, :]
    x = tl.load(parts + (lane * splits + split)[:, None] * wide + e[None, :], mask=inside, other=0.0)
    whole = tl.sum(total * weight, 0)
    y = tl.sum(x * weight[:, None], 0) / tl.where(whole == 0, 1.0, whole)
    tl.store(out + lane * wide + e, y.to(out.dtype.element_ty), mask=e < wide)
