"""y = x w' at few rows, where w has 4 or 8 bits an element, in words of 16 bits that hold parts of a span.

Word j of a span of 128 holds the codes j, j + 32, j + 64, j + 96, or of 8 bits j, j + 64, from the lowest bits on: the
same bits of neighbouring words are codes of neighbouring columns, as the units that multiply want them, without any
exchange.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compiler.kernels.codes import plain
from compiler.kernels.dense import corner, finish, scale_of
from compiler.kernels.overlap import wait


@triton.jit
def codes_of(words, part: tl.constexpr, kind: tl.constexpr, dtype: tl.constexpr, tile: tl.constexpr,
             piece: tl.constexpr):  # fmt: skip
    """The codes [tile, piece] of a part, those of i4 less 8, from pairs of 16 bits [tile, piece / 2]; floats but E2M1
    times 2^-9.

    Where nothing is shifted, the bits read as float16 are a subnormal number: one `and` and one product with a sum for
    two codes. A shift of both halves stays one instruction only if an exponent is put above (`or`), which takes a
    register for its constant: else the compiler takes the halves apart, and a third of all instructions is that.
    """
    shifted: tl.constexpr = part > (0 if kind == "i8" else 1)
    own = words >> 8 if shifted else words
    scale: tl.constexpr = (16 if part % 2 else 1) if kind != "i8" else 1
    zero: tl.constexpr = 8 if kind == "i4" else 128 if kind == "i8" else 0
    if kind == "f4e2m1":  # its three bits are a float16's exponent and fraction, 2^-14 too small
        moved = words << (12 - 4 * part)
        bits = (moved & 0x80008000) | ((moved & 0x70007000) >> 3)
    elif kind == "i8":  # its lowest is 0 once the bit of the sign counts up
        bits = (own & 0x00FF00FF) ^ (0x64806480 if shifted else 0x00800080)
    elif dtype == tl.int8:
        bits = (words >> 4 * part) & 0x000F000F
    else:
        bits = own & (0x00F000F0 if part % 2 else 0x000F000F)
        if shifted:
            bits = bits | 0x64006400
    value = tl.reshape(tl.join((bits & 0xFFFF).to(tl.uint16), (bits >> 16).to(tl.uint16)), (tile, piece))
    if dtype == tl.int8:
        value = value.to(tl.int8) - zero
    elif kind == "f4e2m1":
        value = value.to(tl.float16, bitcast=True) * 16384.0
    elif shifted:
        value = value.to(tl.float16, bitcast=True) * (1 / scale / 512) - (1024 / scale + zero) / 512
    else:
        value = value.to(tl.float16, bitcast=True) * (32768.0 / scale) - zero / 512
    return value.to(tl.float32).to(dtype) if dtype == tl.bfloat16 else value


@triton.jit
def beside(pointer, row, first, outs: tl.constexpr, tile: tl.constexpr, parts: tl.constexpr):
    """A value for each of `parts` x `tile` outs from the outs at `first` on, row[part] of [K, outs], below 0 for none.

    Read in words of 4 bytes, the least that is read ahead: what a loop reads otherwise, it waits for.
    """
    kind: tl.constexpr = pointer.dtype.element_ty
    size: tl.constexpr = 1 if outs % (32 // kind.primitive_bitwidth) else 32 // kind.primitive_bitwidth
    each: tl.constexpr = tile // size
    q = tl.arange(0, parts * each)
    row = tl.reshape(tl.broadcast_to(row[:, None], (parts, each)), (parts * each,))
    n = first + q % each * size
    ok = (n < outs) & (row >= 0)
    if size == 1:  # no return in here: Triton would compile what follows too
        found = tl.load(pointer + row * outs + n, mask=ok, other=0)
    else:
        words = tl.load(pointer.to(tl.pointer_type(tl.uint32)) + (row * outs + n) // size, mask=ok, other=0)
        if size == 2:
            both = tl.join((words & 0xFFFF).to(tl.uint16), (words >> 16).to(tl.uint16))
        else:
            low, high = words & 0xFFFF, words >> 16
            both = tl.join(tl.join(low & 0xFF, high & 0xFF), tl.join(low >> 8, high >> 8)).to(tl.uint8)
        found = tl.reshape(both, (parts * tile,)).to(kind, bitcast=True)
    return found


@triton.jit
def fine_scales(scale, first, j, start, ins: tl.constexpr, outs: tl.constexpr, tile: tl.constexpr, parts: tl.constexpr):
    """Scales of E4M3 as float16 [parts tile, piece] for the columns first[part] + j: each for 16 of them."""
    low = beside(scale, tl.where(first < ins, first // 16, -1), start, outs, tile, parts)
    high = beside(scale, tl.where(first + 16 < ins, first // 16 + 1, -1), start, outs, tile, parts)
    return plain(tl.where((j < 16)[None, :], low[:, None], high[:, None]), "f8e4m3") * 256.0


@triton.jit
def packed(
    x, w, scale, zero, x_scale, bias, residual, y, count,
    outs: tl.constexpr, ins: tl.constexpr, kind: tl.constexpr, group: tl.constexpr, x_kind: tl.constexpr,
    x_block: tl.constexpr, span: tl.constexpr, share: tl.constexpr, unit: tl.constexpr, rows: tl.constexpr,
    tile: tl.constexpr, parts: tl.constexpr, chunk: tl.constexpr, band: tl.constexpr, stages: tl.constexpr,
    once: tl.constexpr, overlap: tl.constexpr = False,
):  # fmt: skip
    """Grid (outs / tile, count / rows): y [count, outs], computed as (w x')' since w's codes are made in registers.

    `share` columns of a `span`, a whole part or more, have the same scales; codes are 1 / `unit` of their value.
    The spans go in turn to `parts`, each a row of its own on both sides: what multiplies takes 8 or 16 rows of x, and
    where there are fewer, the parts fill it; of the sums that this makes only those of equal parts count.
    """
    policy: tl.constexpr = "evict_first" if once else ""  # of a weight that nobody reads again
    wait(overlap)
    across, down = corner(band)
    held: tl.constexpr = 2 if kind == "i8" else 4
    piece: tl.constexpr = span // held
    a, b, j, k = tl.arange(0, tile * parts), tl.arange(0, rows * parts), tl.arange(0, piece // 2), tl.arange(0, piece)
    n, m, part_of = across * tile + a % tile, down * rows + b % rows, tl.arange(0, parts)
    spans: tl.constexpr = (ins + span - 1) // span
    fine: tl.constexpr = group > 0 and group < piece  # scales inside of what is multiplied at once
    each: tl.constexpr = (spans + parts * chunk - 1) // (parts * chunk) * chunk
    words = w.to(tl.pointer_type(tl.uint32)) + n[:, None].to(tl.int64) * (spans * piece // 2)
    words += (a // tile)[:, None] * (piece // 2) + j[None, :]
    xs = x + m[:, None].to(tl.int64) * ins + (b // rows)[:, None] * span + k[None, :]
    sums: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    ones = tl.full([tile * parts, piece], 1, x.dtype.element_ty)
    total = tl.zeros([tile * parts, rows * parts], tl.float32)
    for index in tl.range(0, each, chunk, num_stages=stages):  # said here, it holds for the loads of scales too
        for number in tl.static_range(chunk):
            at = (index + number) * parts  # the span of the first part
            if outs % tile or spans % (parts * chunk):
                inside = (n < outs) & (at + a // tile < spans)
                word = tl.load(
                    words + number * parts * piece // 2, mask=inside[:, None], other=0, eviction_policy=policy
                )
            else:
                word = tl.load(words + number * parts * piece // 2, eviction_policy=policy)
            for part in tl.static_range(held):
                if part * piece % share == 0:
                    acc = tl.zeros([tile * parts, rows * parts], sums)
                    all_x = tl.zeros([tile * parts, rows * parts], sums)
                ok = (m < count)[:, None]
                if ins % span or spans % (parts * chunk):
                    ok = ok & (((at + b // rows) * span + part * piece)[:, None] + k[None, :] < ins)
                narrow = tl.load(xs + number * parts * span + part * piece, mask=ok, other=0.0)
                if fine:
                    first = (at + part_of) * span + part * piece
                    code = codes_of(word, part, kind, tl.float16, tile * parts, piece)
                    code *= fine_scales(scale, first, k, across * tile, ins, outs, tile, parts)
                    code = code.to(tl.float32).to(narrow.dtype)
                else:
                    code = codes_of(word, part, kind, narrow.dtype, tile * parts, piece)
                acc = tl.dot(code, tl.trans(narrow), acc, out_dtype=sums)
                if zero is not None:
                    all_x = tl.dot(ones, tl.trans(narrow), all_x, out_dtype=sums)
                if (part + 1) * piece % share == 0:
                    one = acc.to(tl.float32)
                    first = (at + part_of) * span + (part + 1) * piece - share
                    x_first = (at + b // rows) * span + (part + 1) * piece - share
                    row = tl.where(first < ins, first // group if group else 0, -1)
                    if zero is not None:
                        less = beside(zero, row, across * tile, outs, tile, parts).to(tl.float32) * (1 / unit)
                        one -= less[:, None] * all_x.to(tl.float32)
                    step = tl.full([tile * parts], unit, tl.float32)
                    if group and not fine:
                        step *= scale_of(beside(scale, row, across * tile, outs, tile, parts))
                    one *= step[:, None]
                    if x_block:
                        whole = x_scale + m * (ins // x_block) + x_first // x_block
                        one *= scale_of(tl.load(whole, mask=(m < count) & (x_first < ins), other=0.0))[None, :]
                    total += one
        words += parts * chunk * piece // 2
        xs += parts * chunk * span
    if parts > 1:
        kept = tl.where((a // tile)[:, None] == (b // rows)[None, :], total, 0.0)
        total = tl.sum(tl.sum(tl.reshape(kept, (parts, tile, parts, rows)), 2), 0)
    n, m = across * tile + tl.arange(0, tile), down * rows + tl.arange(0, rows)
    finish(tl.trans(total), n, m, None if group else scale, x_scale, bias, residual, y, count, outs, x_kind)
