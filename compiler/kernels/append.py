"""Rotary embedding of q and k, and the append of k and v to the paged cache: a launch, or a part of `decode`."""

from __future__ import annotations

import triton
import triton.language as tl

from compiler.kernels.codes import HEAD, code_of, keep_head, scale_of
from compiler.kernels.overlap import wait

FAR = tl.constexpr(
    1.0e38
)  # beyond any key or value, and less than half of what float32 holds: their difference is finite


@triton.jit
def turned(
    x, base, ok, cos, sin, pairs: tl.constexpr, step: tl.constexpr, size: tl.constexpr, span: tl.constexpr
):  # fmt: skip
    """Rows [N, span] of `size` numbers at x + base, pairs turned in float32 (arXiv:2104.09864, eq. 34), then rounded.

    The other of a pair is read beside it: a row that is written back must have been read by all threads.
    """
    d = tl.arange(0, span)
    inside = ok[:, None] & (d < size)[None, :]
    y = tl.load(x + base[:, None] + d[None, :], mask=inside, other=0.0)
    if pairs > 0:
        first = d < pairs if step == 1 else d % 2 == 0
        pair = tl.where(first, d, d - pairs) if step == 1 else d // 2
        other = tl.where(first, d + pairs, d - pairs) if step == 1 else d ^ 1
        turns = d < 2 * pairs
        angle_cos = tl.load(cos + pair, mask=turns, other=1.0)
        angle_sin = tl.load(sin + pair, mask=turns, other=0.0)
        angle_sin = tl.where(first, -angle_sin, angle_sin)
        z = tl.load(x + base[:, None] + other[None, :], mask=inside & turns[None, :], other=0.0).to(tl.float32)
        y = (y.to(tl.float32) * angle_cos[None, :] + z * angle_sin[None, :]).to(y.dtype)
    return y


@triton.jit
def keep(x, cache, row, ok, size: tl.constexpr, codes: tl.constexpr, span: tl.constexpr):
    """Write rows x [N, span] as the rows of a cache; gives what it holds of them, and of codes scale and zero [N]."""
    at = tl.arange(0, span)
    inside = ok[:, None] & (at < size)[None, :]
    if codes is None:
        scale, zero = row, row
        y = x.to(cache.dtype.element_ty)
        target = cache + row[:, None] * size
    else:
        wide = x.to(tl.float32)
        low = tl.min(tl.where(inside, wide, FAR), 1)
        scale, zero = scale_of(low, tl.max(tl.where(inside, wide, -FAR), 1), codes)
        keep_head(cache, row, scale, zero, ok, size + HEAD)
        y = code_of(wide, scale[:, None], zero[:, None], codes)
        target = cache + (row[:, None] * (size + HEAD) + HEAD)
    tl.store(target + at[None, :], y, mask=inside)
    return y, scale, zero


@triton.jit
def place_of(slot, head, groups: tl.constexpr, block: tl.constexpr):
    """Which rows [N] of a cache [C, groups, block, size] heads [N] have in a slot, block id * block + place."""
    return (slot // block * groups + head) * block + slot % block


@triton.jit
def append(
    q, k, v, cos, sin, slots, k_cache, v_cache, first,
    q_row: tl.constexpr, q_head: tl.constexpr, k_row: tl.constexpr, k_head: tl.constexpr,
    v_row: tl.constexpr, v_head: tl.constexpr,
    heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr, wide: tl.constexpr, block: tl.constexpr,
    pairs: tl.constexpr, step: tl.constexpr, codes: tl.constexpr, tile: tl.constexpr, dim_span: tl.constexpr,
    wide_span: tl.constexpr, overlap: tl.constexpr = False,
):  # fmt: skip
    """Turn q in place, write turned k and v to slot = block id * block + place; a slot below 0 is padding.

    Grid (tokens from `first` on, head tiles of q when pairs > 0, then of k); rows of q, k, v are `*_row` apart, heads
    `*_head`. Tokens that `decode` turns and writes by itself are not among them.
    """
    token = (first + tl.program_id(0)).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots + token)
    wait(overlap)
    if slot < 0:
        return
    query_tiles: tl.constexpr = (heads + tile - 1) // tile if pairs > 0 else 0
    if pairs > 0:
        cos += token * pairs
        sin += token * pairs
    d = tl.arange(0, dim_span)
    if part < query_tiles:
        head = part * tile + tl.arange(0, tile)
        ok = head < heads
        base = token * q_row + head * q_head
        x = turned(q, base, ok, cos, sin, pairs, step, dim, dim_span)
        tl.debug_barrier()
        tl.store(q + base[:, None] + d[None, :], x, mask=ok[:, None] & (d < 2 * pairs)[None, :])
    else:
        head = (part - query_tiles) * tile + tl.arange(0, tile)
        ok = head < groups
        row = place_of(slot.to(tl.int64), head, groups, block)
        key = turned(k, token * k_row + head * k_head, ok, cos, sin, pairs, step, dim, dim_span)
        keep(key, k_cache, row, ok, dim, codes, dim_span)
        value = turned(v, token * v_row + head * v_head, ok, None, None, 0, step, wide, wide_span)
        keep(value, v_cache, row, ok, wide, codes, wide_span)
