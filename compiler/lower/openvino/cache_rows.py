"""Rows of a quantized cache as plain operations: what the plugin's own attention reads and writes in one piece.

The opset can't look at four bytes as a float32, so scale and zero are put together from sign, exponent and fraction.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset15 as ops

from compiler.ir.cache_rows import HEAD, LEAST
from compiler.lower.openvino.emitter import Emitter
from compiler.lower.openvino.operations import axes

# 2^(e - 127) by the exponent's bits e; numbers below the normal ones count as 0, and e = 255 occurs in no row
_POWERS = np.ldexp(np.float32(1.0), np.minimum(np.arange(256), 254) - 127)
_POWERS[[0, 255]] = 0.0


def from_rows(e: Emitter, rows: ov.Output) -> ov.Output:
    """The numbers f32[*N,D] of rows u8[*N,D+8]."""
    wide = ops.convert(rows, "f32")
    bits = _cut(wide, HEAD, 2**31 - 1)
    return ops.multiply(ops.subtract(bits, _float(e, wide, 4)), _float(e, wide, 0)).output(0)


def rounded(e: Emitter, x: ov.Output) -> ov.Output:
    """What `x` f32[*N,D] is after it was in the cache."""
    low, high = ops.reduce_min(x, axes(-1), True), ops.reduce_max(x, axes(-1), True)
    exact = ops.divide(ops.subtract(high, low), e.scalar(255.0))
    scale = ops.select(ops.equal(exact, e.scalar(0.0)), e.scalar(LEAST["u8"]), exact)
    zero = ops.divide(ops.negative(low), scale)
    code = ops.clamp(ops.round(ops.add(ops.divide(x, scale), zero), "half_to_even"), 0.0, 255.0)
    return ops.multiply(ops.subtract(code, zero), scale).output(0)


def _cut(rows: ov.Output | ov.Node, start: int, stop: int) -> ov.Node:
    return ops.slice(rows, axes(start), axes(stop), axes(1), axes(-1))


def _float(e: Emitter, rows: ov.Node, start: int) -> ov.Node:
    """The float32 [*N,1] in the bytes from `start` on, the lowest first."""
    b0, b1, b2, b3 = (_cut(rows, start + place, start + place + 1) for place in range(4))
    half = e.scalar(128.0)
    high2, high3 = (ops.convert(ops.greater_equal(byte, half), "f32") for byte in (b2, b3))
    low2, low3 = (ops.subtract(b, ops.multiply(high, half)) for b, high in ((b2, high2), (b3, high3)))
    exponent = ops.convert(ops.add(ops.multiply(low3, e.scalar(2.0)), high2), "i32")
    fraction = ops.add(
        ops.add(ops.multiply(low2, e.scalar(2.0**-7)), ops.multiply(b1, e.scalar(2.0**-15))),
        ops.multiply(b0, e.scalar(2.0**-23)),
    )
    size = ops.multiply(ops.add(fraction, e.scalar(1.0)), ops.gather(ops.constant(_POWERS), exponent, np.int64(0)))
    return ops.multiply(size, ops.subtract(e.scalar(1.0), ops.multiply(high3, e.scalar(2.0))))
