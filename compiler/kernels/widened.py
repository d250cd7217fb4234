"""y = x w' at many rows, where w's codes lie in words: its weights are made in registers, in the type of x.

A weight is what `dequantize` says: (code - zero) times scale, rounded to that type. So nothing is left to do with the
sums: one product of a span's columns follows the other, and the next span's weights are made in the meantime.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compiler.kernels.dense import corner, finish, scale_of
from compiler.kernels.overlap import wait
from compiler.kernels.packed import beside


@triton.jit
def codes_in(words, part: tl.constexpr, kind: tl.constexpr, tile: tl.constexpr, piece: tl.constexpr):
    """The values of codes of one part as float16 [tile, piece]; words [tile, piece / 2] are pairs of 16 bits.

    A number from 1024 on has the code below the ten bits of its fraction.
    """
    if kind == "i8":  # the bit of the sign counts up there
        bits = ((words >> 8 * part) & 0x00FF00FF) ^ 0x64806480
    elif kind == "f4e2m1":  # its three bits are a float16's exponent and fraction, 2^-14 too small
        moved = words << 12 - 4 * part
        bits = (moved & 0x80008000) | ((moved & 0x70007000) >> 3)
    else:
        own = words if part < 2 else words >> 8
        bits = (own & (0x00F000F0 if part % 2 else 0x000F000F)) | 0x64006400
    both = tl.join((bits & 0xFFFF).to(tl.uint16), (bits >> 16).to(tl.uint16))
    value = tl.reshape(both, (tile, piece)).to(tl.float16, bitcast=True)
    if kind == "i8":
        return value - 1152
    if kind == "f4e2m1":
        return value * 16384
    less: tl.constexpr = 8 if kind == "i4" else 0
    return value * 0.0625 - (64 + less) if part % 2 else value - (1024 + less)


@triton.jit
def weights_in(
    words, part: tl.constexpr, kind: tl.constexpr, scale, zero, first, start, outs: tl.constexpr, ins: tl.constexpr,
    group: tl.constexpr, tile: tl.constexpr, piece: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The weights of one part [tile, piece] of the span from column `first` and out `start` on."""
    share: tl.constexpr = max(group, piece)  # the same scales are loaded once: part by part the same expression
    at = first + part * piece // share * share
    row = tl.where(at < ins, at // share if group else 0, -1) + tl.arange(0, 1)
    value = codes_in(words, part, kind, tile, piece)
    if zero is not None:
        value -= beside(zero, row, start, outs, tile, 1).to(tl.float16)[:, None]
    if group:
        step = beside(scale, row, start, outs, tile, 1)
        if step.dtype == tl.float16 and dtype == tl.float16:
            value *= step[:, None]
        else:
            value = value.to(tl.float32) * scale_of(step)[:, None]
    return value if value.dtype == dtype else value.to(tl.float32).to(dtype)


@triton.jit
def span_in(
    words, kind: tl.constexpr, scale, zero, first, start, outs: tl.constexpr, ins: tl.constexpr, group: tl.constexpr,
    tile: tl.constexpr, span: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The weights [tile, span] from column `first` and out `start` on; without groups what is left to scale by rows."""
    held: tl.constexpr = 2 if kind == "i8" else 4
    piece: tl.constexpr = span // held
    even = weights_in(words, 0, kind, scale, zero, first, start, outs, ins, group, tile, piece, dtype)
    odd = weights_in(words, 1, kind, scale, zero, first, start, outs, ins, group, tile, piece, dtype)
    if held == 2:
        whole = tl.permute(tl.join(even, odd), (0, 2, 1))
    else:
        third = weights_in(words, 2, kind, scale, zero, first, start, outs, ins, group, tile, piece, dtype)
        last = weights_in(words, 3, kind, scale, zero, first, start, outs, ins, group, tile, piece, dtype)
        whole = tl.permute(tl.join(tl.join(even, third), tl.join(odd, last)), (0, 2, 3, 1))
    return tl.reshape(whole, (tile, span))


@triton.jit
def widened(
    x, w, scale, zero, bias, residual, y, count,
    outs: tl.constexpr, ins: tl.constexpr, kind: tl.constexpr, group: tl.constexpr, span: tl.constexpr,
    rows: tl.constexpr, tile: tl.constexpr, band: tl.constexpr, splits: tl.constexpr, stages: tl.constexpr,
    once: tl.constexpr, overlap: tl.constexpr = False,
):  # fmt: skip
    """Grid (outs / tile, count / rows, splits): y [count, outs], computed as (w x')'; codes lie as packed.py has them.

    Where the columns are split, y is f32[splits, count, outs], and `joined` adds what is each split's.
    """
    policy: tl.constexpr = "evict_first" if once else ""  # of a weight that nobody reads again
    wait(overlap)
    across, down = corner(band)
    held: tl.constexpr = 2 if kind == "i8" else 4
    piece: tl.constexpr = span // held
    spans: tl.constexpr = (ins + span - 1) // span
    each: tl.constexpr = (spans + splits - 1) // splits
    dtype: tl.constexpr = x.dtype.element_ty
    n, m = across * tile + tl.arange(0, tile), down * rows + tl.arange(0, rows)
    j, k, begin = tl.arange(0, piece // 2), tl.arange(0, span), tl.program_id(2) * each
    words = w.to(tl.pointer_type(tl.uint32)) + n[:, None].to(tl.int64) * (spans * piece // 2)
    words += begin * (piece // 2) + j[None, :]
    xs = x + m[:, None].to(tl.int64) * ins + begin * span + k[None, :]
    total = tl.zeros([tile, rows], tl.float32)
    for at in tl.range(begin, begin + each, num_stages=stages):  # said here, it holds for the loads of scales too
        inside = (m < count)[:, None]
        if outs % tile or spans % splits:
            word = tl.load(words, mask=((n < outs) & (at < spans))[:, None], other=0, eviction_policy=policy)
        else:
            word = tl.load(words, eviction_policy=policy)
        if ins % span or spans % splits:
            inside = inside & (at * span + k < ins)[None, :]
        narrow = tl.load(xs, mask=inside, other=0.0)
        whole = span_in(word, kind, scale, zero, at * span, across * tile, outs, ins, group, tile, span, dtype)
        total = tl.dot(whole, tl.trans(narrow), total)
        words += piece // 2
        xs += span
    if splits == 1:
        finish(tl.trans(total), n, m, None if group else scale, None, bias, residual, y, count, outs, "")
    else:
        where = (tl.program_id(2) * count + m).to(tl.int64)[None, :] * outs + n[:, None]
        tl.store(y + where, total, mask=(m < count)[None, :] & (n < outs)[:, None])


@triton.jit
def joined(
    sums, scale, bias, residual, y, count,
    outs: tl.constexpr, splits: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr, overlap: tl.constexpr = False,
):  # fmt: skip
    """Grid (outs / tile, count / rows): y [count, outs] of sums f32[splits, count, outs], added in order."""
    wait(overlap)
    n, m = tl.program_id(0) * tile + tl.arange(0, tile), tl.program_id(1) * rows + tl.arange(0, rows)
    inside = (m < count)[:, None] & (n < outs)[None, :]
    total = tl.zeros([rows, tile], tl.float32)
    for split in tl.static_range(splits):
        total += tl.load(sums + (split * count + m).to(tl.int64)[:, None] * outs + n[None, :], mask=inside, other=0.0)
    finish(total, n, m, scale, None, bias, residual, y, count, outs, "")
