"""Rows of a quantized KV cache in a kernel: scale and zero in float32, then codes (compiler/ir/cache_rows.py).

Codes of E4M3 are made and read by their bits, on every architecture alike: below SM89 there is no conversion, and these
are a few integer operations beside a load from memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

HEAD = tl.constexpr(8)  # bytes before the codes
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: a number up to 2^22 added to it is rounded to a whole one, ties to even
SMALL = tl.constexpr(16384.0)  # 2^14: the same, to a multiple of 2^-9, E4M3's step below 2^-6


@triton.jit
def scale_of(low, high, codes: tl.constexpr):
    """Scale and zero of rows whose least and largest numbers are `low` and `high` [N]."""
    if codes == "u8":
        scale = tl.div_rn(high - low, 255.0)
        scale = tl.where(scale == 0.0, 1e-4, scale)
        zero = tl.div_rn(-low, scale)
    else:
        scale = tl.maximum(tl.div_rn(tl.maximum(-low, high), 448.0), 1e-12)
        zero = scale * 0.0
    return scale, zero


@triton.jit
def code_of(x, scale, zero, codes: tl.constexpr):
    """The codes u8 of float32 numbers, rounded with ties to even."""
    y = tl.div_rn(x, scale)
    if codes == "u8":
        whole = tl.minimum(tl.maximum(y + zero, 0.0), 255.0) + ROUND
        code = whole.to(tl.int32, bitcast=True) & 255
    else:
        size = tl.minimum(tl.abs(y), 448.0)
        bits = size.to(tl.int32, bitcast=True)
        large = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 0x3C0  # 3 bits of fraction; the exponent's bias is 7
        small = (size + SMALL).to(tl.int32, bitcast=True) & 0xF  # SMALL ends in zeros
        code = tl.where(size < 0.015625, small, large) | tl.where(y < 0.0, 0x80, 0)
    return code.to(tl.uint8)


# A branch that a constant decides is compiled alone, but what follows a return in it is compiled too: one return each.
@triton.jit
def plain(code, codes: tl.constexpr):
    """What codes u8 are before their scale: 0 to 255, or the numbers of E4M3 over 256; others as they are."""
    if codes is None:
        x = code
    elif codes == "u8":
        x = code.to(tl.float16)
    else:
        wide = code.to(tl.int16)
        x = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)  # the exponent's bias is another
    return x


@triton.jit
def number_of(code, factor, shift, codes: tl.constexpr):
    """The float32 numbers [N, D] of codes with factor and shift [N]; others as they are."""
    if codes is None:
        x = code
    elif codes == "u8":
        x = code.to(tl.float32) * factor[:, None] + shift[:, None]
    else:
        x = plain(code, codes).to(tl.float32) * factor[:, None]
    return x


@triton.jit
def nearest_e4m3(x):
    """Float32 numbers up to 448 rounded to E4M3, ties to even; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    large = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (tl.abs(x) + SMALL) - SMALL  # the step is another below SMALL, where a negative number would end
    return tl.where(x != x, x, tl.where(tl.abs(x) < 0.015625, tl.where(x < 0.0, -small, small), large))


@triton.jit
def nearest_e2m1(x):
    """Float32 numbers rounded to E2M1, ties to even: a step of 0.5 below 2, of 1 below 4, then 2; NaN becomes 0."""
    size = tl.minimum(tl.maximum(tl.where(x != x, 0.0, x), -6.0), 6.0)
    step = tl.where(tl.abs(size) < 2.0, 0.5, tl.where(tl.abs(size) < 4.0, 1.0, 2.0))
    return ((size / step + ROUND) - ROUND) * step


@triton.jit
def power_of_two(largest, emax: tl.constexpr):
    """2^(floor(log2 largest) - emax) of float32 numbers, 1 for 0 and NaN (OCP MX, 6.3); at least 2^-126, a number."""
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, emax + 1) - emax
    return tl.where(largest > 0.0, (exponent << 23).to(tl.float32, bitcast=True), 1.0)


@triton.jit
def head_at(rows, row, size: tl.constexpr):
    """Where scales and zeros of rows of so many bytes lie, as float32."""
    return (rows + row * size).to(tl.pointer_type(tl.float32))


@triton.jit
def keep_head(rows, row, scale, zero, mask, size: tl.constexpr):
    """Write scale and zero of rows."""
    at = head_at(rows, row, size)
    tl.store(at, scale, mask=mask)
    tl.store(at + 1, zero, mask=mask)
