"""One tile of attention, shared by prefill and decode: scores, mask, and the running softmax (arXiv:2205.14135)."""

from __future__ import annotations

import triton
import triton.language as tl

from compiler.kernels.codes import HEAD, head_at, number_of, plain

LOG2E = tl.constexpr(1.4426950408889634)
FAR = tl.constexpr(-1.0e38)  # a masked score; finite, so that a tile with nothing to see gives no NaN


@triton.jit
def rounded(x):
    """float32 rounded to the nearest bfloat16, ties to even; by its bits, because the interpreter's cast truncates."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def scores(
    q, whole, k, factor, shift, at, keys, head, context, prefix, slopes,
    scale: tl.constexpr, causal: tl.constexpr, window: tl.constexpr, softcap: tl.constexpr, bf16_bias: tl.constexpr,
    codes: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Scores [M, N] in log2 units: q [M, D] at positions `at` [M, 1], of heads `head` [M], over k [N, D] at `keys`.

    Codes are multiplied as they are, exactly, and the products scaled: factor q'code + shift sum(q), `whole` [M].
    """
    s = tl.dot(q, tl.trans(plain(k, codes).to(q.dtype)), input_precision="ieee")
    if codes is not None:
        s = s * factor[None, :]
        if codes == "u8":
            s += whole[:, None] * shift[None, :]
    if softcap is not None:
        x = s * (scale / softcap)
        e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
        t = (1.0 - e) / (1.0 + e)  # tanh of |x|: no overflow
        s = tl.where(x < 0, -t, t) * (softcap * LOG2E)
    else:
        s = s * (scale * LOG2E)
    if slopes is not None:
        if bf16_bias is None:
            s += (tl.load(slopes + head) * LOG2E)[:, None] * keys.to(tl.float32)
        else:  # each factor and the product rounded, as the operation's body has it
            bias = rounded(tl.load(slopes + head))[:, None] * rounded(keys.to(tl.float32))
            s += rounded(bias) * (bf16_bias * LOG2E)
    if masked:
        see = keys < context
        if causal:
            before = keys <= at
            if prefix is not None:
                before = before | (keys < prefix)
            see = see & before
        if window is not None:
            see = see & (at - keys < window)
        s = tl.where(see, s, FAR)
    return s


@triton.jit
def update(s, v, top, total, out):
    """The running maximum [M], sum [M] and weighted values [M, E], with scores s [M, N] of values v [N, E] added."""
    new = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new[:, None])
    shrink = tl.exp2(top - new)
    total = total * shrink + tl.sum(p, 1)
    out = out * shrink[:, None]
    out = tl.dot(p.to(v.dtype), v, out, input_precision="ieee")
    return new, total, out


@triton.jit
def row_of(block_ids, begin, first, group, context, groups: tl.constexpr, block: tl.constexpr, tile: tl.constexpr):
    """Which rows [tile] of a cache [C, groups, block, size] the positions from `first` on have."""
    place = tl.arange(0, tile)
    if tile <= block:
        number = tl.load(block_ids + begin + first // block).to(tl.int64)
        return (number * groups + group) * block + first % block + place
    inside = first + place < context
    numbers = tl.load(block_ids + begin + (first + place) // block, mask=inside, other=0).to(tl.int64)
    return (numbers * groups + group) * block + place % block


@triton.jit
def rows_of(cache, row, first, context, size: tl.constexpr, codes: tl.constexpr, tile: tl.constexpr,
            span: tl.constexpr, masked: tl.constexpr):  # fmt: skip
    """Elements [tile, span] of rows, of 8-bit caches their codes; zeros from the position `context` on."""
    place, at = tl.arange(0, tile), tl.arange(0, span)
    if codes is None:
        where = cache + row[:, None] * size + at[None, :]
    else:
        where = cache + row[:, None] * (size + HEAD) + HEAD + at[None, :]
    if masked:  # what lies behind the context may be anything, NaN too
        ok = (first + place < context)[:, None]
        if span != size:
            ok = ok & (at < size)[None, :]
        return tl.load(where, mask=ok, other=0)
    if span != size:
        return tl.load(where, mask=(at < size)[None, :], other=0)
    return tl.load(where)


@triton.jit
def heads_of(cache, row, first, context, size: tl.constexpr, codes: tl.constexpr, tile: tl.constexpr,
             masked: tl.constexpr):  # fmt: skip
    """Factor and shift [tile] that make numbers of `plain` codes; of a cache of numbers nothing that is used."""
    if codes is None:
        factor = row
        shift = row
    else:
        head = head_at(cache, row, size + HEAD)
        # zeros where nobody is: bytes that were not written may be NaN
        ok = first + tl.arange(0, tile) < context
        factor = tl.load(head, mask=ok, other=0.0) if masked else tl.load(head)
        zero = factor
        if codes == "u8":
            zero = tl.load(head + 1, mask=ok, other=0.0) if masked else tl.load(head + 1)
        factor, shift = factors(factor, zero, codes)
    return factor, shift


@triton.jit
def factors(scale, zero, codes: tl.constexpr):
    """Factor and shift that make numbers of `plain` codes with a scale and a zero."""
    if codes == "u8":
        shift = -scale * zero
    else:
        scale = scale * 256.0
        shift = scale
    return scale, shift


@triton.jit
def over_tile(
    q, whole, at, head, top, total, out, index, k_cache, v_cache, block_ids, begin, context, before, slopes, group,
    groups: tl.constexpr, dim: tl.constexpr, wide: tl.constexpr, block: tl.constexpr, scale: tl.constexpr,
    causal: tl.constexpr, window: tl.constexpr, softcap: tl.constexpr, bf16_bias: tl.constexpr, codes: tl.constexpr,
    tile: tl.constexpr, dim_span: tl.constexpr, wide_span: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """The running maximum, sum and weighted values with the key tile `index` of a sequence added."""
    first = index * tile
    row = row_of(block_ids, begin, first, group, context, groups, block, tile)
    k = rows_of(k_cache, row, first, context, dim, codes, tile, dim_span, masked)
    factor, shift = heads_of(k_cache, row, first, context, dim, codes, tile, masked)
    keys = (first + tl.arange(0, tile))[None, :]
    s = scores(
        q, whole, k, factor, shift, at, keys, head, context, before, slopes, scale, causal, window, softcap, bf16_bias,
        codes, masked,
    )  # fmt: skip
    v = rows_of(v_cache, row, first, context, wide, codes, tile, wide_span, masked)
    factor, shift = heads_of(v_cache, row, first, context, wide, codes, tile, masked)
    return update(s, number_of(v, factor, shift, codes).to(q.dtype), top, total, out)
