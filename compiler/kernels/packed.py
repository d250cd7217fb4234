"""y = x w' where w has 4 bits an element, in words of 16 bits that hold codes a quarter of a span apart.

Word j of a span of 128 holds the codes j, j + 32, j + 64, j + 96, from the lowest bits on: the same four bits of
neighbouring words are codes of neighbouring columns, as the units that multiply want them, without any exchange.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compiler.kernels.dense import corner, finish, scale_of


@triton.jit
def codes_of(word, zero, part: tl.constexpr, kind: tl.constexpr, dtype: tl.constexpr):
    """The codes less their zero in float16: 0x6400 | c are the bits of 1024 + c, so that one sum makes a float of c."""
    if kind == "f4e2m1":  # the same three bits are a float16's exponent and fraction, 2^14 too small
        moved = word << (12 - 4 * part)
        value = ((moved & 0x8000) | ((moved & 0x7000) >> 3)).to(tl.float16, bitcast=True) * 16384.0
    elif part % 2:
        value = (((word >> 8 * (part // 2)) & 0xF0) | 0x6400).to(tl.float16, bitcast=True) * 0.0625 + (-64.0 - zero)
    else:
        value = (((word >> 8 * (part // 2)) & 0xF) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + zero)
    return value if dtype == tl.float16 else value.to(tl.float32).to(dtype)


@triton.jit
def packed(
    x, w, scale, zero, x_scale, bias, residual, y, count,
    outs: tl.constexpr, ins: tl.constexpr, kind: tl.constexpr, group: tl.constexpr, x_kind: tl.constexpr,
    x_block: tl.constexpr, span: tl.constexpr, share: tl.constexpr, rows: tl.constexpr, tile: tl.constexpr,
    band: tl.constexpr,
):  # fmt: skip
    """Grid (outs / tile, count / rows): y [count, outs], computed as (w x')' since w's codes are made in registers.

    `share` columns of a `span`, a whole quarter or more, have the same scales.
    """
    across, down = corner(band)
    n, m, j = across * tile + tl.arange(0, tile), down * rows + tl.arange(0, rows), tl.arange(0, span // 4)
    quarter: tl.constexpr = span // 4
    spans: tl.constexpr = (ins + span - 1) // span
    words = w.to(tl.pointer_type(tl.uint16)) + n[:, None].to(tl.int64) * (spans * quarter) + j[None, :]
    xs = x + m[:, None].to(tl.int64) * ins + j[None, :]
    integer: tl.constexpr = x.dtype.element_ty == tl.int8
    sums: tl.constexpr = tl.int32 if integer else tl.float32
    total = tl.zeros([tile, rows], tl.float32)
    for index in range(spans):
        word = tl.load(words, mask=(n < outs)[:, None], other=0) if outs % tile else tl.load(words)
        acc = tl.zeros([tile, rows], sums)
        for part in tl.static_range(4):
            first = index * span + part * quarter
            ok = (m < count)[:, None]
            if ins % span:
                ok = ok & (first + j < ins)[None, :]
            narrow = tl.load(xs + part * quarter, mask=ok, other=0.0)
            at = n if group == 0 else first // group * outs + n
            there, here = n < outs, m < count
            if ins % span:  # behind the last column there is no scale either
                there, here = there & (n * 0 + first < ins), here & (m * 0 + first < ins)
            less = tl.full([tile], 8.0 if kind == "i4" else 0.0, tl.float16)
            if zero is not None:
                less += tl.load(zero + at, mask=there, other=0).to(tl.float16)
            wide = codes_of(word, less[:, None], part, kind, tl.float16 if integer else narrow.dtype)
            if integer:
                wide = wide.to(tl.int8)
            acc = tl.dot(wide, tl.trans(narrow), acc, out_dtype=sums)
            if (part + 1) * quarter % share == 0:
                one = acc.to(tl.float32)
                if group:
                    one *= scale_of(tl.load(scale + at, mask=there, other=0.0))[:, None]
                if x_block:
                    whole = x_scale + m * (ins // x_block) + first // x_block
                    one *= scale_of(tl.load(whole, mask=here, other=0.0))[None, :]
                total += one
                acc = tl.zeros([tile, rows], sums)
        words += quarter
        xs += span
    finish(tl.trans(total), n, m, None if group else scale, x_scale, bias, residual, y, count, outs, x_kind)
