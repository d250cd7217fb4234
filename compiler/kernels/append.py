"""Rotary embedding of q and k, and the append of k and v to the paged cache: one launch in front of attention."""

from __future__ import annotations

import triton
import triton.language as tl

from compiler.kernels.codes import HEAD, code_of, keep_head, scale_of
from compiler.kernels.overlap import wait

FAR = tl.constexpr(
    1.0e38
)  # beyond any key or value, and less than half of what float32 holds: their difference is finite


@triton.jit
def _rotated(x, base, mask, cos, sin, pairs: tl.constexpr, step: tl.constexpr, wide: tl.constexpr):
    """Both halves of the pairs of rows at `base`, turned in float32 (arXiv:2104.09864, eq. 34), and where they lie.

    A thread reads the pair that it writes, so the rows may be turned in place.
    """
    pair = tl.arange(0, wide)
    inside = pair < pairs
    angle_cos = tl.load(cos + pair, mask=inside, other=0.0)[None, :]
    angle_sin = tl.load(sin + pair, mask=inside, other=0.0)[None, :]
    first = pair if step == 1 else 2 * pair
    second = first + (pairs if step == 1 else 1)
    ok = mask[:, None] & inside[None, :]
    a = tl.load(x + base[:, None] + first[None, :], mask=ok, other=0.0).to(tl.float32)
    b = tl.load(x + base[:, None] + second[None, :], mask=ok, other=0.0).to(tl.float32)
    return a * angle_cos - b * angle_sin, b * angle_cos + a * angle_sin, first, second, ok


@triton.jit
def _turn(
    q, cos, sin, token, part, q_row: tl.constexpr, q_head: tl.constexpr, heads: tl.constexpr, pairs: tl.constexpr,
    step: tl.constexpr, tile: tl.constexpr, pair_span: tl.constexpr,
):  # fmt: skip
    """Turn a tile of query heads in place."""
    head = part * tile + tl.arange(0, tile)
    a, b, first, second, turned = _rotated(
        q, token * q_row + head * q_head, head < heads, cos + token * pairs, sin + token * pairs, pairs, step, pair_span
    )
    base = q + (token * q_row + head * q_head)[:, None]
    tl.store(base + first[None, :], a.to(q.dtype.element_ty), mask=turned)
    tl.store(base + second[None, :], b.to(q.dtype.element_ty), mask=turned)


@triton.jit
def _span_of(x, mask, low, high):
    """`low` and `high` [N] with what rows of `x` [N, D] have below and above them."""
    low = tl.minimum(low, tl.min(tl.where(mask, x, FAR), 1))
    return low, tl.maximum(high, tl.max(tl.where(mask, x, -FAR), 1))


@triton.jit
def _keep(
    k, v, cos, sin, place, k_cache, v_cache, token, part,
    k_row: tl.constexpr, k_head: tl.constexpr, v_row: tl.constexpr, v_head: tl.constexpr, groups: tl.constexpr,
    dim: tl.constexpr, wide: tl.constexpr, block: tl.constexpr, pairs: tl.constexpr, step: tl.constexpr,
    codes: tl.constexpr, tile: tl.constexpr, span: tl.constexpr, pair_span: tl.constexpr, wide_span: tl.constexpr,
):  # fmt: skip
    """Write a tile of key heads, turned where they are, and value heads to the cache."""
    head = part * tile + tl.arange(0, tile)
    ok = head < groups
    row = (place // block * groups + head) * block + place % block
    bytes_before: tl.constexpr = 0 if codes is None else HEAD
    low = tl.full([tile], FAR, tl.float32)
    high = tl.full([tile], -FAR, tl.float32)
    if pairs > 0:
        a, b, first, second, turned = _rotated(
            k, token * k_row + head * k_head, ok, cos + token * pairs, sin + token * pairs, pairs, step, pair_span
        )
        # rounded to the type of k first, as `rotate` does
        a = a.to(k.dtype.element_ty)
        b = b.to(k.dtype.element_ty)
        if codes is not None:
            low, high = _span_of(a.to(tl.float32), turned, low, high)
            low, high = _span_of(b.to(tl.float32), turned, low, high)
    if 2 * pairs < dim:
        at = 2 * pairs + tl.arange(0, span)
        rest = ok[:, None] & (at < dim)[None, :]
        x = tl.load(k + (token * k_row + head * k_head)[:, None] + at[None, :], mask=rest)
        if codes is not None:
            low, high = _span_of(x.to(tl.float32), rest, low, high)
    scale = low
    zero = low
    if codes is not None:
        scale, zero = scale_of(low, high, codes)
        keep_head(k_cache, row, scale, zero, ok, dim + HEAD)
    target = k_cache + (row * (dim + bytes_before) + bytes_before)[:, None]
    if pairs > 0:
        tl.store(target + first[None, :], _stored(a, scale, zero, k_cache, codes), mask=turned)
        tl.store(target + second[None, :], _stored(b, scale, zero, k_cache, codes), mask=turned)
    if 2 * pairs < dim:
        tl.store(target + at[None, :], _stored(x, scale, zero, k_cache, codes), mask=rest)
    at_v = tl.arange(0, wide_span)
    both = ok[:, None] & (at_v < wide)[None, :]
    y = tl.load(v + (token * v_row + head * v_head)[:, None] + at_v[None, :], mask=both)
    if codes is not None:
        low, high = _span_of(
            y.to(tl.float32), both, tl.full([tile], FAR, tl.float32),
            tl.full([tile], -FAR, tl.float32),
        )  # fmt: skip
        scale, zero = scale_of(low, high, codes)
        keep_head(v_cache, row, scale, zero, ok, wide + HEAD)
    target = v_cache + (row * (wide + bytes_before) + bytes_before)[:, None]
    tl.store(target + at_v[None, :], _stored(y, scale, zero, v_cache, codes), mask=both)


@triton.jit
def _stored(x, scale, zero, cache, codes: tl.constexpr):
    """Numbers [N, D] as the cache has them, with the scales and zeros [N] of codes."""
    if codes is None:
        y = x.to(cache.dtype.element_ty)
    else:
        y = code_of(x.to(tl.float32), scale[:, None], zero[:, None], codes)
    return y


@triton.jit
def append(
    q, k, v, cos, sin, slots, k_cache, v_cache,
    q_row: tl.constexpr, q_head: tl.constexpr, k_row: tl.constexpr, k_head: tl.constexpr,
    v_row: tl.constexpr, v_head: tl.constexpr,
    heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr, wide: tl.constexpr, block: tl.constexpr,
    pairs: tl.constexpr, step: tl.constexpr, codes: tl.constexpr, tile: tl.constexpr, span: tl.constexpr,
    pair_span: tl.constexpr, wide_span: tl.constexpr, overlap: tl.constexpr = False,
):  # fmt: skip
    """Turn q in place, write turned k and v to slot = block id * block + place; a slot below 0 is padding.

    Grid (T, head tiles of q when pairs > 0, then of k); rows of q, k, v are `*_row` apart, heads `*_head`.
    """
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots + token)
    wait(overlap)
    if slot < 0:
        return
    place = slot.to(tl.int64)
    if pairs > 0:
        query_tiles: tl.constexpr = (heads + tile - 1) // tile
        if part < query_tiles:
            _turn(q, cos, sin, token, part, q_row, q_head, heads, pairs, step, tile, pair_span)
        else:
            _keep(
                k, v, cos, sin, place, k_cache, v_cache, token, part - query_tiles, k_row, k_head, v_row, v_head,
                groups, dim, wide, block, pairs, step, codes, tile, span, pair_span, wide_span,
            )  # fmt: skip
    else:
        _keep(
            k, v, cos, sin, place, k_cache, v_cache, token, part, k_row, k_head, v_row, v_head, groups, dim, wide,
            block, pairs, step, codes, tile, span, pair_span, wide_span,
        )  # fmt: skip
