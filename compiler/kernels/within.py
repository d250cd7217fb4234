"""Attention of padded rows [B, S] within themselves, without a cache: flash attention (arXiv:2307.08691)."""

from __future__ import annotations

import triton
import triton.language as tl

from compiler.kernels.overlap import wait
from compiler.kernels.softmax import FAR, scores, update

PADDING = tl.constexpr(1 << 30)  # the place of a key that nobody sees


@triton.jit
def _heads(x, token, count, head, row: tl.constexpr, start: tl.constexpr, dim: tl.constexpr,
           span: tl.constexpr):  # fmt: skip
    """Elements [tokens, span] of one head, zeros beyond `count` tokens and `dim` columns."""
    d = tl.arange(0, span)
    where = x + token[:, None].to(tl.int64) * row + start + head * dim + d[None, :]
    return tl.load(where, mask=(token < count)[:, None] & (d < dim)[None, :], other=0.0)


@triton.jit
def within(
    q, k, v, positions, out, S, count,  # noqa: N803 (S is the dim)
    q_row: tl.constexpr, q_start: tl.constexpr, k_row: tl.constexpr, k_start: tl.constexpr, v_row: tl.constexpr,
    v_start: tl.constexpr, heads: tl.constexpr, groups: tl.constexpr, dim: tl.constexpr, wide: tl.constexpr,
    scale: tl.constexpr, causal: tl.constexpr, window: tl.constexpr, softcap: tl.constexpr, rows: tl.constexpr,
    tile: tl.constexpr, dim_span: tl.constexpr, wide_span: tl.constexpr, overlap: tl.constexpr = False,
):  # fmt: skip
    """Grid (H, B S / rows): out [B S, H, E]; a query sees the keys of its own S tokens, at positions from 0 on.

    A tile may have the end of one row and the beginning of the next; it goes over the keys of both.
    """
    wait(overlap)
    head = tl.program_id(0)
    group = head // (heads // groups)
    token = tl.program_id(1) * rows + tl.arange(0, rows)
    at = tl.load(positions + token, mask=token < count, other=-1)[:, None]
    x = _heads(q, token, count, head, q_row, q_start, dim, dim_span)
    top = tl.full([rows], FAR, tl.float32)
    total = tl.full([rows], 0.0, tl.float32)
    acc = tl.zeros([rows, wide_span], tl.float32)
    first = tl.program_id(1) * rows
    last = tl.minimum(first + rows, count) - 1
    for index in range(first // S * S // tile, tl.cdiv((last // S + 1) * S, tile)):
        key = index * tile + tl.arange(0, tile)
        place = tl.load(positions + key, mask=key < count, other=-1)
        place = tl.where(place < 0, PADDING, place)[None, :]
        y = _heads(k, key, count, group, k_row, k_start, dim, dim_span)
        s = scores(
            x, top, y, None, None, at, place, None, PADDING, None, None, scale, causal, window, softcap, None, None,
            True,
        )  # fmt: skip
        s = tl.where((token // S)[:, None] == (key // S)[None, :], s, 3 * FAR)  # beyond what is only masked
        top, total, acc = update(s, _heads(v, key, count, group, v_row, v_start, wide, wide_span), top, total, acc)
    e = tl.arange(0, wide_span)
    y = (acc / total[:, None]).to(out.dtype.element_ty)
    where = out + (token[:, None].to(tl.int64) * heads + head) * wide + e[None, :]
    tl.store(where, y, mask=(token < count)[:, None] & (e < wide)[None, :])
