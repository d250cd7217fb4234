"""y = x w' where x and w have whole numbers of bytes an element: floats, INT8, FP8, with scales and without."""

from __future__ import annotations

import triton
import triton.language as tl

from compiler.kernels.codes import plain
from compiler.kernels.overlap import wait


@triton.jit
def scale_of(values):
    """Scales in float32; u8 holds E8M0, a power of two by its exponent's bits."""
    if values.dtype == tl.uint8:
        return (values.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def corner(band: tl.constexpr):
    """Which tile a block makes: `band` tiles of rows at a time go over all outs, so that both operands stay in L2."""
    across, down = tl.program_id(0), tl.program_id(1)
    if band > 1:
        wide, high = tl.num_programs(0), tl.num_programs(1)
        index = down * wide + across
        first = index // (band * wide) * band
        size = tl.minimum(high - first, band)
        inside = index % (band * wide)
        across, down = inside // size, first + inside % size
    return across, down


@triton.jit
def finish(acc, n, m, scale, x_scale, bias, residual, y, count, outs: tl.constexpr, x_kind: tl.constexpr):
    """Scales of whole rows, sums, one rounding; acc [rows, tile], n and m its outs and rows."""
    where = m[:, None].to(tl.int64) * outs + n[None, :]
    ok = (m < count)[:, None] & (n < outs)[None, :]
    acc = acc.to(tl.float32)
    if x_kind == "tensor":
        acc *= tl.load(x_scale)
    if x_kind == "row":
        acc *= tl.load(x_scale + m, mask=m < count, other=0.0)[:, None]
    if scale is not None:
        acc *= scale_of(tl.load(scale + n, mask=n < outs, other=0.0))[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < outs, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        acc += tl.load(residual + where, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + where, acc.to(y.dtype.element_ty), mask=ok)


@triton.jit
def dense(
    x, w, scale, x_scale, bias, residual, y, count,
    outs: tl.constexpr, ins: tl.constexpr, group: tl.constexpr, x_kind: tl.constexpr, x_block: tl.constexpr,
    rows: tl.constexpr, tile: tl.constexpr, depth: tl.constexpr, band: tl.constexpr, turned: tl.constexpr,
    once: tl.constexpr, overlap: tl.constexpr = False,
):  # fmt: skip
    """Grid (outs / tile, count / rows): y [count, outs]; `turned` computes (w x')', where w is widened in registers.

    With scales inside a row (group, x_block) `depth` columns share one of each, and each depth's sum is scaled.
    """
    policy: tl.constexpr = "evict_first" if once else ""  # of a weight that nobody reads again
    wait(overlap)
    across, down = corner(band)
    n, m, d = across * tile + tl.arange(0, tile), down * rows + tl.arange(0, rows), tl.arange(0, depth)
    xs = x + m[:, None].to(tl.int64) * ins + d[None, :]
    ws = w + n[:, None].to(tl.int64) * ins + d[None, :]
    kind: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    stepped: tl.constexpr = group > 0 or x_block > 0
    total = tl.zeros([rows, tile], tl.float32 if stepped else kind)
    acc = tl.zeros([tile, rows], kind) if turned else tl.zeros([rows, tile], kind)
    for first in range(0, ins, depth):
        if ins % depth == 0:
            if outs % tile:
                wide = tl.load(ws, mask=(n < outs)[:, None], other=0.0, eviction_policy=policy)
            else:
                wide = tl.load(ws, eviction_policy=policy)
            narrow = tl.load(xs, mask=(m < count)[:, None], other=0.0)
        else:
            inside = (first + d < ins)[None, :]
            wide = tl.load(ws, mask=(n < outs)[:, None] & inside, other=0.0, eviction_policy=policy)
            narrow = tl.load(xs, mask=(m < count)[:, None] & inside, other=0.0)
        if wide.dtype == tl.uint8:
            wide = plain(wide, "f8e4m3") * 256.0
        if wide.dtype != narrow.dtype:
            if narrow.dtype == tl.bfloat16:
                wide = wide.to(tl.float32)
            wide = wide.to(narrow.dtype)
        if turned:
            acc = tl.dot(wide, tl.trans(narrow), acc, out_dtype=kind)
        else:
            acc = tl.dot(narrow, tl.trans(wide), acc, out_dtype=kind)
        if stepped:
            part = (tl.trans(acc) if turned else acc).to(tl.float32)
            if group:
                part *= scale_of(tl.load(scale + first // group * outs + n, mask=n < outs, other=0.0))[None, :]
            if x_block:
                whole = x_scale + m * (ins // x_block) + first // x_block
                part *= scale_of(tl.load(whole, mask=m < count, other=0.0))[:, None]
            total += part
            acc = tl.zeros_like(acc)
        xs += depth
        ws += depth
    if not stepped:
        total = tl.trans(acc) if turned else acc
    finish(total, n, m, None if group else scale, x_scale, bias, residual, y, count, outs, x_kind)
