"""Rotary embedding of q and k, and the append of k and v to the paged cache: one launch in front of attention."""

from __future__ import annotations

import triton
import triton.language as tl


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
def _keep(
    k, v, cos, sin, place, k_cache, v_cache, token, part,
    k_row: tl.constexpr, k_head: tl.constexpr, v_row: tl.constexpr, v_head: tl.constexpr, groups: tl.constexpr,
    dim: tl.constexpr, wide: tl.constexpr, block: tl.constexpr, pairs: tl.constexpr, step: tl.constexpr,
    tile: tl.constexpr, span: tl.constexpr, pair_span: tl.constexpr, wide_span: tl.constexpr,
):  # fmt: skip
    """Write a tile of key heads, turned where they are, and value heads to the cache."""
    head = part * tile + tl.arange(0, tile)
    ok = head < groups
    row = (place // block * groups + head) * block + place % block
    if pairs > 0:
        a, b, first, second, turned = _rotated(
            k, token * k_row + head * k_head, ok, cos + token * pairs, sin + token * pairs, pairs, step, pair_span
        )
        target = k_cache + (row * dim)[:, None]
        # rounded to the type of k first, as `rotate` does
        tl.store(target + first[None, :], a.to(k.dtype.element_ty).to(k_cache.dtype.element_ty), mask=turned)
        tl.store(target + second[None, :], b.to(k.dtype.element_ty).to(k_cache.dtype.element_ty), mask=turned)
    if 2 * pairs < dim:
        at = 2 * pairs + tl.arange(0, span)
        rest = ok[:, None] & (at < dim)[None, :]
        x = tl.load(k + (token * k_row + head * k_head)[:, None] + at[None, :], mask=rest)
        tl.store(k_cache + (row * dim)[:, None] + at[None, :], x.to(k_cache.dtype.element_ty), mask=rest)
    at_v = tl.arange(0, wide_span)
    both = ok[:, None] & (at_v < wide)[None, :]
    y = tl.load(v + (token * v_row + head * v_head)[:, None] + at_v[None, :], mask=both)
    tl.store(v_cache + (row * wide)[:, None] + at_v[None, :], y.to(v_cache.dtype.element_ty), mask=both)


@triton.jit
def append(
    q, k, v, cos, sin, slots, k_cache, v_cache,
    q_row: tl.constexpr, q_head: tl.constexpr, k_row: tl.constexpr, k_head: tl.constexpr,
    v_row: tl.constexpr, v_head: tl.constexpr,
    heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr, wide: tl.constexpr, block: tl.constexpr,
    pairs: tl.constexpr, step: tl.constexpr, tile: tl.constexpr, span: tl.constexpr,
    pair_span: tl.constexpr, wide_span: tl.constexpr,
):  # fmt: skip
    """Turn q in place, write turned k and v to slot = block id * block + place; a slot below 0 is padding.

    Grid (T, head tiles of q when pairs > 0, then of k); rows of q, k, v are `*_row` apart, heads `*_head`.
    """
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slot = tl.load(slots + token)
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
                groups, dim, wide, block, pairs, step, tile, span, pair_span, wide_span,
            )  # fmt: skip
    else:
        _keep(
            k, v, cos, sin, place, k_cache, v_cache, token, part, k_row, k_head, v_row, v_head, groups, dim, wide,
            block, pairs, step, tile, span, pair_span, wide_span,
        )  # fmt: skip
