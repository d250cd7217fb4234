"""Rows sorted by expert, and the weighted sum of what the experts made of a row; expert_source.py writes the products.

The order is made on the device: a step with experts has the same launches whatever the router chose (arXiv:2211.15841).
"""

from __future__ import annotations

import triton
import triton.language as tl

from compiler.kernels.overlap import wait


@triton.jit
def order(
    chosen, slots, owners, total, count, experts: tl.constexpr, each: tl.constexpr, rows: tl.constexpr,
    bins: tl.constexpr, chunk: tl.constexpr, overlap: tl.constexpr = False,
):  # fmt: skip
    """Grid (E,): pair p is choice p % K of row p / K; slots [tiles, rows] has the pairs by expert, -1 behind the last.

    owners [tiles] is the expert of each tile, total [1] how many there are. `chosen` of rows that nobody reads may be
    anything.
    """
    wait(overlap)
    expert = tl.program_id(0)
    pairs = count * each
    at, number = tl.arange(0, chunk), tl.arange(0, bins)
    counts = tl.zeros([bins], tl.int32)
    for first in range(0, pairs, chunk):
        inside = first + at < pairs
        who = tl.minimum(tl.maximum(tl.load(chosen + first + at, mask=inside, other=0), 0), experts - 1)
        counts += tl.histogram(who, bins, mask=inside)
    tiles = (counts + (rows - 1)) // rows
    begin = tl.sum(tl.where(number < expert, tiles, 0), 0)
    mine = tl.sum(tl.where(number == expert, tiles, 0), 0)
    if expert == 0:
        tl.store(total, tl.sum(tiles, 0))
    for index in range(mine):
        tl.store(owners + begin + index, expert)
    place = begin * rows
    for first in range(0, pairs, chunk):
        inside = first + at < pairs
        who = tl.minimum(tl.maximum(tl.load(chosen + first + at, mask=inside, other=0), 0), experts - 1)
        same = (inside & (who == expert)).to(tl.int32)
        tl.store(slots + place + tl.cumsum(same, 0) - 1, first + at, mask=same > 0)
        place += tl.sum(same, 0)
    rest = place + tl.arange(0, rows)
    tl.store(slots + rest, tl.full([rows], -1, tl.int32), mask=rest < (begin + mine) * rows)


@triton.jit
def combine(
    weights, results, y, each: tl.constexpr, outs: tl.constexpr, span: tl.constexpr, overlap: tl.constexpr = False
):  # fmt: skip
    """Grid (count,): y [count, outs] = the sum over K of weights [count, K] times results [count, K, outs]."""
    wait(overlap)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, span)
    inside = at < outs
    acc = tl.zeros([span], tl.float32)
    for choice in range(each):
        pair = row * each + choice
        x = tl.load(results + pair * outs + at, mask=inside, other=0.0).to(tl.float32)
        acc += tl.load(weights + pair).to(tl.float32) * x
    tl.store(y + row * outs + at, acc.to(y.dtype.element_ty), mask=inside)
