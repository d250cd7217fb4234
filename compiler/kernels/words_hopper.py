"""y = x w' at 2 to 128 rows on sm_90, where codes of 4 bits lie in words: they become weights in the operand itself.

The numbers of compiler/kernels/widened.py. There a weight goes through shared memory into the layout of the product's
operand; here a thread reads just those words whose codes are its own part of it, as wgmma divides it among the threads
of its warps, so that weights never leave registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.runtime.jit import constexpr_function

from compiler.kernels.dense import corner, finish
from compiler.kernels.overlap import wait

HALF = gl.constexpr(64)  # columns that are multiplied at once: 128 bytes of x
PIECE = gl.constexpr(16)  # words of a row in a span


@gluon.jit
def _pairs(asm: gl.constexpr, a, b):
    """An instruction for two numbers of 16 bits in a word."""
    return gl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def _fused(asm: gl.constexpr, a, b, c):
    return gl.inline_asm_elementwise(asm, "=r,r,r,r", [a, b, c], dtype=gl.uint32, is_pure=True, pack=1)


@gluon.jit
def _twice(value):
    """Numbers of 16 bits, each in both halves of a word."""
    return value.to(gl.uint16, bitcast=True).to(gl.uint32) * 0x10001


@gluon.jit
def _part(words, part: gl.constexpr, kind: gl.constexpr, steps, zeros, nothing, dtype: gl.constexpr):
    """The weights of one part as pairs of `dtype` in words [tile, 16]; `steps` and `zeros` f32 as in `_weights`.

    `nothing` is 0, which the compiler does not know: masks stay in registers, each would be made anew where it is used.
    """
    wide: gl.constexpr = dtype == gl.bfloat16
    sub: gl.constexpr = "sub.rn.bf16x2 $0, $1, $2;" if wide else "sub.rn.f16x2 $0, $1, $2;"
    mul: gl.constexpr = "mul.rn.bf16x2 $0, $1, $2;" if wide else "mul.rn.f16x2 $0, $1, $2;"
    if kind == "f4e2m1":  # its three bits are a number's exponent and fraction, 2^-14 or 2^-126 too small
        moved = words << (12 - 4 * part)
        bits = (moved & (nothing + 0x80008000)) | ((moved & (nothing + 0x70007000)) >> (6 if wide else 3))
        value = _pairs(mul, bits, gl.full(bits.shape, 0x7E807E80 if wide else 0x74007400, gl.uint32, bits.type.layout))
    else:
        less: gl.constexpr = 8 if kind == "i4" else 0
        off = gl.zeros([words.shape[0]], gl.float32, gl.SliceLayout(1, words.type.layout)) + less
        if len(zeros) > 0:
            off += zeros[part * len(zeros) // 4]
        if wide:  # below the seven bits of a fraction from 128 on
            bits = ((words >> 4 * part) & (nothing + 0x000F000F)) | 0x43004300
            value = _pairs(sub, bits, _twice((off + 128).to(dtype))[:, None])
        else:
            own = words if part < 2 else words >> 8
            if part % 2:
                bits = (own & (nothing + 0x00F000F0)) | 0x64006400
                sixteenth = gl.full(bits.shape, 0x2C002C00, gl.uint32, bits.type.layout)
                value = _fused("fma.rn.f16x2 $0, $1, $2, $3;", bits, sixteenth, _twice((-64 - off).to(dtype))[:, None])
            else:
                bits = (own & (nothing + 0x000F000F)) | 0x64006400
                value = _pairs(sub, bits, _twice((off + 1024).to(dtype))[:, None])
    if len(steps) > 0:
        value = _pairs(mul, value, _twice(steps[part * len(steps) // 4])[:, None])
    return value


@constexpr_function
def own_words(tile: int, warps: int) -> gl.DistributedLinearLayout:
    """Which words [tile, 16] of a span a thread reads: those of the columns that it multiplies."""
    registers = [[0, 4], [0, 8], [8, 0]] + [
        [16 * warps << more, 0] for more in range((tile // warps // 16).bit_length() - 1)
    ]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[16 << more, 0] for more in range(warps.bit_length() - 1)], [], [tile, PIECE.value]
    )


@gluon.jit
def _weights(
    words, half: gl.constexpr, kind: gl.constexpr, steps, zeros, nothing, dtype: gl.constexpr, operand: gl.constexpr
):  # fmt: skip
    """The weights [tile, 64] of half a span; `steps` and `zeros` have a value a row for each share of the span."""
    even = _part(words, 2 * half, kind, steps, zeros, nothing, dtype)
    odd = _part(words, 2 * half + 1, kind, steps, zeros, nothing, dtype)
    both = gl.reshape(gl.permute(gl.join(even, odd), (0, 2, 1)), (words.shape[0], 2 * PIECE))
    both = gl.join((both & 0xFFFF).to(gl.uint16), (both >> 16).to(gl.uint16))
    both = gl.reshape(both, (words.shape[0], HALF)).to(dtype, bitcast=True)
    return gl.convert_layout(both, operand, assert_trivial=True)


@gluon.jit
def _copied(
    at, slot, rings, sources, count, outs: gl.constexpr, ins: gl.constexpr, group: gl.constexpr, span: gl.constexpr,
    ragged: gl.constexpr, policy: gl.constexpr,
):  # fmt: skip
    """Start the copies of span `at`: its words, its columns of x, its scales and zeros."""
    ring_w, ring_x, ring_s, ring_z = rings
    there, n, xs, m, k, scale, s_n, zero, z_n = sources
    spans: gl.constexpr = (ins + span - 1) // span
    shares: gl.constexpr = max(span // group, 1) if group else 0  # scales of a row in a span
    ok = n[:, None] < outs
    if ragged:
        ok = ok & (at < spans)
    async_copy.async_load(ring_w.index(slot), there + at * PIECE, mask=ok, eviction_policy=policy)
    for half in gl.static_range(2):
        inside = m[:, None] < count
        if ins % span or ragged:
            inside = inside & (at * span + half * HALF + k < ins)[None, :]
        async_copy.async_load(ring_x.index(slot * 2 + half), xs + at * span + half * HALF, mask=inside)
    for share in gl.static_range(shares):
        row = gl.minimum(at * span // group + share, ins // group - 1)
        async_copy.async_load(ring_s.index(slot * shares + share), scale + row * outs + s_n, mask=s_n < outs)
        if zero is not None:
            async_copy.async_load(ring_z.index(slot * shares + share), zero + row * outs + z_n, mask=z_n < outs)
    async_copy.commit_group()


@gluon.jit
def words(
    x, w, scale, zero, bias, residual, y, count,
    outs: gl.constexpr, ins: gl.constexpr, kind: gl.constexpr, group: gl.constexpr, span: gl.constexpr,
    rows: gl.constexpr, tile: gl.constexpr, band: gl.constexpr, splits: gl.constexpr, stages: gl.constexpr,
    once: gl.constexpr, overlap: gl.constexpr = False,
):  # fmt: skip
    """Grid (outs / tile, count / rows, splits): y [count, outs], computed as (w x')'; codes lie as packed.py has them.

    Where the columns are split, y is f32[splits, count, outs], and `joined` adds what is each split's.
    """
    policy: gl.constexpr = "evict_first" if once else ""  # of a weight that nobody reads again
    wait(overlap)
    across, down = corner(band)
    warps: gl.constexpr = gl.num_warps()
    dtype: gl.constexpr = x.dtype.element_ty
    spans: gl.constexpr = (ins + span - 1) // span
    each: gl.constexpr = (spans + splits - 1) // splits
    ragged: gl.constexpr = spans % splits > 0
    shares: gl.constexpr = max(span // group, 1) if group else 0
    begin = gl.program_id(2) * each
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, rows, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    own: gl.constexpr = own_words(tile, warps)
    line: gl.constexpr = gl.SliceLayout(1, own)
    # copies: words and x 16 bytes a thread, scales and zeros 4 bytes a thread
    to_words: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [warps, 1], [1, 0])
    to_x: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0])
    # rows of words lie so that those of a warp, of eight rows at a time, are in different banks
    spread: gl.constexpr = gl.SwizzledSharedLayout(4, 2, 4, [1, 0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    swizzled: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, HALF], dtype)
    ring_w = gl.allocate_shared_memory(gl.uint32, [stages, tile, PIECE], spread)
    ring_x = gl.allocate_shared_memory(dtype, [stages * 2, rows, HALF], swizzled)
    n = across * tile + gl.arange(0, tile, layout=gl.SliceLayout(1, to_words))
    ring_s = ring_w  # of nothing where there are no groups
    ring_z = ring_w
    s_n = n
    z_n = n
    if group:
        size: gl.constexpr = 32 // scale.dtype.element_ty.primitive_bitwidth
        ring_s = gl.allocate_shared_memory(scale.dtype.element_ty, [stages * shares, tile], flat)
        s_n = across * tile + gl.arange(0, tile, layout=gl.BlockedLayout([size], [32], [warps], [0]))
        if zero is not None:
            ring_z = gl.allocate_shared_memory(zero.dtype.element_ty, [stages * shares, tile], flat)
            z_n = across * tile + gl.arange(0, tile, layout=gl.BlockedLayout([4], [32], [warps], [0]))
    j = gl.arange(0, PIECE, layout=gl.SliceLayout(0, to_words))
    there = w.to(gl.pointer_type(gl.uint32)) + n[:, None].to(gl.int64) * (spans * PIECE) + j[None, :]
    m = down * rows + gl.arange(0, rows, layout=gl.SliceLayout(1, to_x))
    k = gl.arange(0, HALF, layout=gl.SliceLayout(0, to_x))
    xs = x + m[:, None].to(gl.int64) * ins + k[None, :]
    rings = (ring_w, ring_x, ring_s, ring_z)
    sources = (there, n, xs, m, k, scale, s_n, zero, z_n)
    for index in gl.static_range(stages - 1):
        if index < each:
            _copied(begin + index, index, rings, sources, count, outs, ins, group, span, ragged, policy)
        else:
            async_copy.commit_group()
    nothing = (count >> 31).to(gl.uint32)
    acc = gl.zeros([tile, rows], gl.float32, layout=mma)
    for index in range(each):
        async_copy.wait_group(stages - 2)
        ahead = index + stages - 1
        if ahead < each:
            _copied(begin + ahead, ahead % stages, rings, sources, count, outs, ins, group, span, ragged, policy)
        else:
            async_copy.commit_group()
        slot = index % stages
        word = ring_w.index(slot).load(own)
        steps = ()
        zeros = ()
        for share in gl.static_range(shares):
            step = ring_s.index(slot * shares + share).load(line)
            if step.dtype == gl.uint8:
                step = (step.to(gl.uint16) << 7).to(gl.bfloat16, bitcast=True)
            steps = steps + (step,)  # noqa: RUF005
            if zero is not None:
                less = ring_z.index(slot * shares + share).load(line).to(gl.float32)
                zeros = zeros + (less,)  # noqa: RUF005
        first = _weights(word, 0, kind, steps, zeros, nothing, dtype, operand)
        acc = warpgroup_mma(first, ring_x.index(slot * 2).permute((1, 0)), acc, is_async=True)
        last = _weights(word, 1, kind, steps, zeros, nothing, dtype, operand)
        acc = warpgroup_mma(last, ring_x.index(slot * 2 + 1).permute((1, 0)), acc, is_async=True)
        acc, first, last = warpgroup_mma_wait(0, deps=(acc, first, last))
    async_copy.wait_group(0)
    out: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [warps, 1], [1, 0])
    total = gl.convert_layout(gl.permute(acc, (1, 0)), out)
    n = across * tile + gl.arange(0, tile, layout=gl.SliceLayout(0, out))
    m = down * rows + gl.arange(0, rows, layout=gl.SliceLayout(1, out))
    if splits == 1:
        finish(total, n, m, None if group else scale, None, bias, residual, y, count, outs, "")
    else:
        where = (gl.program_id(2) * count + m).to(gl.int64)[:, None] * outs + n[None, :]
        gl.store(y + where, total, mask=(m < count)[:, None] & (n < outs)[None, :])
