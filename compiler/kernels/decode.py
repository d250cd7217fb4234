"""Attention of one new token a sequence over the paged cache, split over the keys (flash decoding), in one launch.

The query heads of a key head are rows of one tile, so that each block of the cache is read once. Which split ends last
joins all. Where sequences are few, the last split also turns the new key, writes it and its value to the cache, and
sees them from registers: one launch less; where they are many, a launch costs less than that does in each block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compiler.kernels.append import keep, place_of, turned
from compiler.kernels.codes import number_of
from compiler.kernels.overlap import wait
from compiler.kernels.softmax import FAR, LOG2E, factors, over_tile, scores, update


@triton.jit
def decode(
    q, k, v, cos, sin, slots, k_cache, v_cache, out, parts, tops, ended, past_lens, block_ids, block_begins,
    prefix, sinks, slopes,
    q_row: tl.constexpr, q_head: tl.constexpr, k_row: tl.constexpr, k_head: tl.constexpr,
    v_row: tl.constexpr, v_head: tl.constexpr,
    heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr, wide: tl.constexpr, block: tl.constexpr,
    pairs: tl.constexpr, step: tl.constexpr, scale: tl.constexpr, causal: tl.constexpr, window: tl.constexpr,
    softcap: tl.constexpr, bf16_bias: tl.constexpr, codes: tl.constexpr, splits: tl.constexpr, rows: tl.constexpr,
    tile: tl.constexpr, new: tl.constexpr, dim_span: tl.constexpr, wide_span: tl.constexpr,
    overlap: tl.constexpr = False,
):  # fmt: skip
    """Grid (B, K, splits): out [B, H, E]; token b is the only new one of sequence b, past_lens[b] below 0 is padding.

    Without `new`, `append` has turned q and written k and v. With more than one split, parts f32[B, H, splits, E], tops
    f32[2, B, H, splits] and ended i32[B, K], zeros before and after, are memory of its own.
    """
    row = tl.program_id(0)
    group = tl.program_id(1)
    split = tl.program_id(2)
    past = tl.load(past_lens + row)
    begin = tl.load(block_begins + row)
    context = past + 1  # what is in the cache
    if new:
        context = past
        slot = tl.load(slots + row)
    low = 0
    if window is not None:
        low = tl.maximum(past + 1 - window, 0) // tile
    high = tl.cdiv(context, tile)
    each = tl.maximum(tl.cdiv(high - low, splits), 1)
    used = tl.maximum(tl.cdiv(high - low, each), 1)  # the others have no keys, and nobody waits for them
    wait(overlap)
    if split >= used:
        return
    low += split * each
    high = tl.minimum(low + each, high)
    before = None
    if prefix is not None:
        before = tl.load(prefix + row)
    share: tl.constexpr = heads // groups
    member = tl.arange(0, rows)
    ok = member < share
    head = group * share + tl.where(ok, member, 0)
    token = row.to(tl.int64)
    turns: tl.constexpr = pairs if new else 0
    if turns > 0:
        cos += token * pairs
        sin += token * pairs
    x = turned(q, token * q_row + head * q_head, ok, cos, sin, turns, step, dim, dim_span)
    if new:
        # read here, seen behind the others: nobody waits for it then
        last = (split == used - 1) & (slot >= 0)
        one = group + tl.arange(0, 1)
        here = tl.arange(0, 1) < tl.where(last, 1, 0)
        at = place_of(slot.to(tl.int64), one, groups, block)
        key = turned(k, token * k_row + one * k_head, here, cos, sin, pairs, step, dim, dim_span)
        value = turned(v, token * v_row + one * v_head, here, None, None, 0, step, wide, wide_span)
        key, key_factor, key_shift = keep(key, k_cache, at, here, dim, codes, dim_span)
        value, value_factor, value_shift = keep(value, v_cache, at, here, wide, codes, wide_span)
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
    if new:  # noqa: SIM102 - decided when compiled, the next one on the GPU
        if last:  # the first of a tile of 16 keys, the least that products take; the others are not seen
            if codes is not None:
                key_factor, key_shift = factors(key_factor, key_shift, codes)
                value_factor, value_shift = factors(value_factor, value_shift, codes)
            number = number_of(value, value_factor, value_shift, codes).to(x.dtype)
            s = scores(
                x, whole, tl.broadcast_to(key, (16, dim_span)), key_factor, key_shift, past,
                (past + tl.arange(0, 16))[None, :], head, past + 1, before, slopes, scale, causal, window, softcap,
                bf16_bias, codes, True,
            )  # fmt: skip
            top, total, acc = update(s, tl.broadcast_to(number, (16, wide_span)), top, total, acc)
    e = tl.arange(0, wide_span)
    lane = token * heads + head
    inside = ok[:, None] & (e < wide)[None, :]
    if splits > 1:
        lanes = tl.num_programs(0).to(tl.int64) * heads * splits
        tl.store(parts + (lane * splits + split)[:, None] * wide + e[None, :], acc, mask=inside)
        tl.store(tops + lane * splits + split, top, mask=ok)
        tl.store(tops + lanes + lane * splits + split, total, mask=ok)
        tl.debug_barrier()  # all threads have written before one says so
        if tl.atomic_add(ended + token * groups + group, 1, sem="acq_rel") == used - 1:
            tl.store(ended + token * groups + group, 0)
            _join(parts, tops, out, lane, lanes, ok, used, wide, splits, rows, wide_span)
    else:
        y = acc / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(out + lane[:, None] * wide + e[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _join(
    parts, tops, out, lane, lanes, ok, used, wide: tl.constexpr, splits: tl.constexpr,
    rows: tl.constexpr, wide_span: tl.constexpr,
):  # fmt: skip
    """The heads of a key head from their splits, in order: the same bits, whichever split ended last."""
    split, e = tl.arange(0, splits), tl.arange(0, wide_span)
    there = ok[:, None] & (split < used)[None, :]
    every = tl.load(tops + lane[:, None] * splits + split[None, :], mask=there, other=FAR, cache_modifier=".cg")
    top = tl.max(every, 1)
    total = tl.full([rows], 0.0, tl.float32)
    acc = tl.zeros([rows, wide_span], tl.float32)
    for index in tl.static_range(splits):
        own, there = lane * splits + index, ok & (tl.full([rows], index, tl.int32) < used)
        weight = tl.exp2(tl.load(tops + own, mask=there, other=FAR, cache_modifier=".cg") - top)
        total += tl.load(tops + lanes + own, mask=there, other=0.0, cache_modifier=".cg") * weight
        where = parts + own[:, None] * wide + e[None, :]
        inside = there[:, None] & (e < wide)[None, :]
        acc += tl.load(where, mask=inside, other=0.0, cache_modifier=".cg") * weight[:, None]
    y = acc / tl.where(total == 0, 1.0, total)[:, None]
    inside = ok[:, None] & (e < wide)[None, :]
    tl.store(out + lane[:, None] * wide + e[None, :], y.to(out.dtype.element_ty), mask=inside)
