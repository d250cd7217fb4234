"""y = x w' for few rows: bound by reading w once, so the tiles are tall in its rows and deep in stages."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gemm(
    x, w, bias, residual, y, count,
    outs: tl.constexpr, ins: tl.constexpr, x_row: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr,
    depth: tl.constexpr,
):  # fmt: skip
    """Grid (outs / tile, count / rows): y [count, outs] = x [count, ins] w[outs, ins]' + bias + residual."""
    n = tl.program_id(0) * tile + tl.arange(0, tile)
    m, d = tl.program_id(1) * rows + tl.arange(0, rows), tl.arange(0, depth)
    xs = x + m[:, None] * x_row + d[None, :]
    ws = w + n[:, None].to(tl.int64) * ins + d[None, :]
    acc = tl.zeros([rows, tile], tl.float32)
    for first in range(0, ins, depth):
        if ins % depth == 0:
            wide = tl.load(ws, mask=(n < outs)[:, None], other=0.0) if outs % tile else tl.load(ws)
            narrow = tl.load(xs, mask=(m < count)[:, None], other=0.0)
        else:
            inside = (first + d < ins)[None, :]
            wide = tl.load(ws, mask=(n < outs)[:, None] & inside, other=0.0)
            narrow = tl.load(xs, mask=(m < count)[:, None] & inside, other=0.0)
        acc = tl.dot(narrow, tl.trans(wide), acc, input_precision="ieee")
        xs += depth
        ws += depth
    where = m[:, None] * outs + n[None, :]
    ok = (m < count)[:, None] & (n < outs)[None, :]
    if bias is not None:
        acc += tl.load(bias + n, mask=n < outs, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        acc += tl.load(residual + where, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + where, acc.to(y.dtype.element_ty), mask=ok)
