"""Attention of many packed tokens on sm_90: one group of warps copies keys and values, two multiply.

The numbers of compiler/kernels/prefill.py. There each product ends before the softmax begins; here the softmax of one
tile runs beside the product of the weights before it with their values, and beside the other group's products (the
order of FlashAttention-3, arXiv:2407.08608), and copies run ahead into the next query tile.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)
FAR = gl.constexpr(-1.0e38)  # a masked score; finite, so that a tile with nothing to see gives no NaN
THREADS = gl.constexpr(128)  # of the group that copies: each of them tells when its part has landed


@gluon.jit
def _item(turn, pairs, lists, heads: gl.constexpr, near: gl.constexpr):
    """The number of this program's `turn`, and of that pair: head, sequence and first token of the query tile.

    Few programs go there and back through the pairs, so that long tiles meet short ones. Where each has but one, those
    that run at a time are of `near` heads: their keys and values fit the L2 cache.
    """
    past_lens, seq_begins, tile_rows, tile_starts, prefix = lists
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    item = turn * programs + gl.where(turn % 2 == 0, place, programs - 1 - place)
    known = gl.minimum(item, pairs - 1)
    head = known % heads
    index = known // heads
    if programs == pairs:
        band = pairs // (heads // near)
        head = known // band * near + known % near
        index = known % band // near
    return item, head, gl.load(tile_rows + index), gl.load(tile_starts + index)


@gluon.jit
def _sequence(lists, row):
    """Tokens before the new ones of a sequence, and where those begin and end."""
    past_lens, seq_begins, tile_rows, tile_starts, prefix = lists
    row = gl.maximum(row, 0)
    return gl.load(past_lens + row), gl.load(seq_begins + row), gl.load(seq_begins + row + 1)


@gluon.jit
def _tiles(
    lists, row, start, past, count, causal: gl.constexpr, window: gl.constexpr, rows: gl.constexpr, tile: gl.constexpr
):
    """Of a query tile: context, prefix; and its key tiles: the first, those all see from and to, the end."""
    past_lens, seq_begins, tile_rows, tile_starts, prefix = lists
    context = past + count
    last = gl.minimum(past + start + rows, context)
    stop = context
    clear = context // tile
    before = 0
    if prefix is not None:
        before = gl.load(prefix + gl.maximum(row, 0))
    if causal:
        stop = last
        clear = (past + start + 1) // tile
        if prefix is not None:
            stop = gl.maximum(stop, gl.minimum(before, context))
    low = 0
    clear_low = 0
    if window is not None:
        low = gl.maximum(past + start - window + 1, 0) // tile
        clear_low = gl.maximum(last - window + tile - 1, 0) // tile
    high = gl.where(row < 0, low, (stop + tile - 1) // tile)  # padding has none
    clear_low = gl.minimum(gl.maximum(clear_low, low), high)
    clear = gl.minimum(gl.maximum(clear, clear_low), high)
    return context, before, low, clear_low, clear, high


@gluon.jit
def _copy_tile(into, cache, parts, place, d, first, context, dim: gl.constexpr, span: gl.constexpr):
    """Rows of the positions from `first` on, `span` of them from each of `parts`; nothing behind the context."""
    for part in gl.static_range(len(parts)):
        inside = first + part * span + place < context
        async_copy.async_load(into.slice(part * span, span), cache + parts[part] + (place * dim + d), mask=inside)


@gluon.jit
def _copy(
    memory, bars, data, lists, pairs, q_row: gl.constexpr, q_head: gl.constexpr, heads: gl.constexpr,
    groups: gl.constexpr, dim: gl.constexpr, block: gl.constexpr, causal: gl.constexpr, window: gl.constexpr,
    rows: gl.constexpr, tile: gl.constexpr, stages: gl.constexpr, queries: gl.constexpr, near: gl.constexpr,
):  # fmt: skip
    """Fills the rings: queries of each pair, keys and values of its key tiles from the last to the first."""
    q_ring, k_ring, v_ring = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = bars
    q, k_cache, v_cache, out, block_ids, block_begins, sinks = data
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [4, 1], [1, 0])
    span: gl.constexpr = min(tile, block)  # keys that lie in one block of the cache
    d = gl.arange(0, dim, layout=gl.SliceLayout(0, across))[None, :]
    place = gl.arange(0, span, layout=gl.SliceLayout(1, across))[:, None]
    lane = gl.arange(0, rows, layout=gl.SliceLayout(1, across))[:, None]
    done = 0
    used = 0
    turn = 0
    # lists are read a turn before they are needed, and what they point to
    item, head, row, start = _item(0, pairs, lists, heads, near)
    past, first_token, end = _sequence(lists, row)
    begin = gl.load(block_begins + gl.maximum(row, 0))
    next_item, next_head, next_row, next_start = _item(1, pairs, lists, heads, near)
    while item < pairs:
        next_past, next_token, next_end = _sequence(lists, next_row)
        next_begin = gl.load(block_begins + gl.maximum(next_row, 0))
        third_item, third_head, third_row, third_start = _item(turn + 2, pairs, lists, heads, near)
        group = head // (heads // groups)
        context, before, low, clear_low, clear, high = _tiles(
            lists, row, start, past, end - first_token, causal, window, rows, tile
        )
        if low < high:
            slot = used % queries
            mbarrier.wait(q_empty.index(slot), ((used // queries) & 1) ^ 1)
            used += 1
            token = first_token + start + lane
            where = q + token.to(gl.int64) * q_row + head * q_head + d
            async_copy.async_load(q_ring.index(slot), where, mask=token < end)
            async_copy.mbarrier_arrive(q_full.index(slot), increment_count=False)
        for back in range(high - low):
            first = (high - 1 - back) * tile
            parts = ()  # where each begins in the cache
            for part in gl.static_range(tile // span):
                key = first + part * span
                number = gl.load(block_ids + begin + key // block, mask=key < context, other=0).to(gl.int64)
                parts = parts + (((number * groups + group) * block + key % block) * dim,)  # noqa: RUF005
            stage = done % stages
            phase = ((done // stages) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            _copy_tile(k_ring.index(stage), k_cache, parts, place, d, first, context, dim, span)
            async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
            mbarrier.wait(v_empty.index(stage), phase)
            _copy_tile(v_ring.index(stage), v_cache, parts, place, d, first, context, dim, span)
            async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
            done += 1
        turn += 1
        item, head, row, start = next_item, next_head, next_row, next_start
        past, first_token, end, begin = next_past, next_token, next_end, next_begin
        next_item, next_head, next_row, next_start = third_item, third_head, third_row, third_start
    async_copy.wait_group(0)


@gluon.jit
def _softmax(
    s, top, total, first, at, context, before, causal: gl.constexpr, window: gl.constexpr, prefixed: gl.constexpr,
    factor: gl.constexpr, tile: gl.constexpr, layout: gl.constexpr, masked: gl.constexpr,
):  # fmt: skip
    """Weights of the scores [M, N], the new maximum and sum, and how much the ones before shrink."""
    if masked:
        keys = first + gl.arange(0, tile, layout=gl.SliceLayout(0, layout))[None, :]
        see = keys < context
        if causal:
            seen = keys <= at[:, None]
            if prefixed:
                seen = seen | (keys < before)
            see = see & seen
        if window is not None:
            see = see & (at[:, None] - keys < window)
        s = gl.where(see, s * factor, FAR)
        new = gl.maximum(top, gl.max(s, 1))
        p = gl.exp2(s - new[:, None])
    else:  # the scale goes into the instruction that takes the maximum off
        new = gl.maximum(top, gl.max(s, 1) * factor)
        p = gl.exp2(s * factor - new[:, None])
    shrink = gl.exp2(top - new)
    return p, new, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def _scores(
    done, query, k_ring, k_full, turns, tile: gl.constexpr, stages: gl.constexpr, layout: gl.constexpr,
    which: gl.constexpr, order: gl.constexpr,
):  # fmt: skip
    """Start the product of the queries with the next key tile, in turn with the other group."""
    stage = done % stages
    mbarrier.wait(k_full.index(stage), (done // stages) & 1)
    fence_async_shared()  # what was copied was written otherwise than products read
    if order:
        mbarrier.wait(turns.index(which), (done & 1) ^ (1 - which))
    nothing = gl.zeros([query.shape[0], tile], gl.float32, layout=layout)
    return warpgroup_mma(query, k_ring.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _tile(
    index, done, query, k_ring, v_ring, bars, p, out, top, total, at, context, before, causal: gl.constexpr,
    window: gl.constexpr, prefixed: gl.constexpr, factor: gl.constexpr, tile: gl.constexpr, stages: gl.constexpr,
    layout: gl.constexpr, operand: gl.constexpr, which: gl.constexpr, order: gl.constexpr, masked: gl.constexpr,
):  # fmt: skip
    """Scores of a key tile, and the values of the one before with its weights `p`; gives the tile's own weights."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = bars
    stage = done % stages
    last = (done - 1) % stages
    s = _scores(done, query, k_ring, k_full, turns, tile, stages, layout, which, order)
    out = warpgroup_mma(p, v_ring.index(last), out, is_async=True)
    if order:
        mbarrier.arrive(turns.index(1 - which), count=1)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    weight, top, total, shrink = _softmax(
        s, top, total, index * tile, at, context, before, causal, window, prefixed, factor, tile, layout, masked
    )
    following = gl.convert_layout(weight.to(p.dtype), operand)
    # the next tile needs the values; here, because ptxas would move the softmax behind the wait for the product
    mbarrier.wait(v_full.index(stage), (done // stages) & 1)
    out, p, following = warpgroup_mma_wait(0, deps=(out, p, following))
    mbarrier.arrive(v_empty.index(last), count=1)
    out = out * gl.convert_layout(shrink, gl.SliceLayout(1, out.type.layout))[:, None]
    return following, out, top, total


@gluon.jit
def _multiply(
    which: gl.constexpr, memory, bars, data, lists, pairs, heads: gl.constexpr, dim: gl.constexpr,
    scale: gl.constexpr, causal: gl.constexpr, window: gl.constexpr, rows: gl.constexpr, tile: gl.constexpr,
    stages: gl.constexpr, queries: gl.constexpr, near: gl.constexpr, order: gl.constexpr,
):  # fmt: skip
    """Half of the rows of each pair: the running softmax over its key tiles, and the values they weigh."""
    q_ring, k_ring, v_ring = memory
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = bars
    q, k_cache, v_cache, out, block_ids, block_begins, sinks = data
    past_lens, seq_begins, tile_rows, tile_starts, prefix = lists
    half: gl.constexpr = rows // 2
    kind: gl.constexpr = q.dtype.element_ty
    factor: gl.constexpr = scale * LOG2E
    prefixed: gl.constexpr = prefix is not None
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tile, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, dim, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    across: gl.constexpr = gl.BlockedLayout([1, 8], [256 // dim, dim // 8], [4, 1], [1, 0])
    lanes: gl.constexpr = gl.SliceLayout(1, layout)
    done = 0
    used = 0
    turn = 0
    item, head, row, start = _item(0, pairs, lists, heads, near)
    past, first_token, end = _sequence(lists, row)
    next_item, next_head, next_row, next_start = _item(1, pairs, lists, heads, near)
    while item < pairs:
        next_past, next_token, next_end = _sequence(lists, next_row)
        third_item, third_head, third_row, third_start = _item(turn + 2, pairs, lists, heads, near)
        context, before, low, clear_low, clear, high = _tiles(
            lists, row, start, past, end - first_token, causal, window, rows, tile
        )
        if low < high:
            at = past + start + which * half + gl.arange(0, half, layout=lanes)
            if sinks is not None:
                sink = gl.load(sinks + head).to(gl.float32) * LOG2E
                top = gl.full([half], 0.0, gl.float32, lanes) + sink
                total = gl.full([half], 1.0, gl.float32, lanes)
            else:
                top = gl.full([half], FAR, gl.float32, lanes)
                total = gl.full([half], 0.0, gl.float32, lanes)
            acc = gl.zeros([half, dim], gl.float32, layout=wide)
            slot = used % queries
            query = q_ring.index(slot).slice(which * half, half)
            mbarrier.wait(q_full.index(slot), (used // queries) & 1)
            stage = done % stages
            s = _scores(done, query, k_ring, k_full, turns, tile, stages, layout, which, order)
            if order:
                mbarrier.arrive(turns.index(1 - which), count=1)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            weight, top, total, shrink = _softmax(
                s, top, total, (high - 1) * tile, at, context, before, causal, window, prefixed, factor, tile,
                layout, True,
            )  # fmt: skip
            p = gl.convert_layout(weight.to(kind), operand)
            mbarrier.wait(v_full.index(stage), (done // stages) & 1)
            done += 1
            for index in range(high - 2, clear - 1, -1):
                p, acc, top, total = _tile(
                    index, done, query, k_ring, v_ring, bars, p, acc, top, total, at, context, before, causal, window,
                    prefixed, factor, tile, stages, layout, operand, which, order, True,
                )  # fmt: skip
                done += 1
            for index in range(gl.minimum(clear, high - 1) - 1, clear_low - 1, -1):
                p, acc, top, total = _tile(
                    index, done, query, k_ring, v_ring, bars, p, acc, top, total, at, context, before, causal, window,
                    prefixed, factor, tile, stages, layout, operand, which, order, False,
                )  # fmt: skip
                done += 1
            if window is not None:
                for index in range(gl.minimum(clear_low, high - 1) - 1, low - 1, -1):
                    p, acc, top, total = _tile(
                        index, done, query, k_ring, v_ring, bars, p, acc, top, total, at, context, before, causal,
                        window, prefixed, factor, tile, stages, layout, operand, which, order, True,
                    )  # fmt: skip
                    done += 1
            last = (done - 1) % stages
            fence_async_shared()
            acc = warpgroup_mma(p, v_ring.index(last), acc, is_async=True)
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
            mbarrier.arrive(v_empty.index(last), count=1)
            y = (acc / gl.convert_layout(total, gl.SliceLayout(1, wide))[:, None]).to(kind)
            query.store(y)  # nobody needs the queries any more, and from there each thread writes whole vectors
            y = query.load(across)
            token = first_token + start + which * half + gl.arange(0, half, layout=gl.SliceLayout(1, across))[:, None]
            e = gl.arange(0, dim, layout=gl.SliceLayout(0, across))[None, :]
            gl.store(out + (token.to(gl.int64) * heads + head) * dim + e, y, mask=token < end)
            mbarrier.arrive(q_empty.index(slot), count=1)
            used += 1
        turn += 1
        item, head, row, start = next_item, next_head, next_row, next_start
        past, first_token, end = next_past, next_token, next_end
        next_item, next_head, next_row, next_start = third_item, third_head, third_row, third_start


@gluon.jit
def prefill(
    q, k_cache, v_cache, out, past_lens, seq_begins, block_ids, block_begins, tile_rows, tile_starts, tiles, prefix,
    sinks, q_row: gl.constexpr, q_head: gl.constexpr, heads: gl.constexpr, groups: gl.constexpr, dim: gl.constexpr,
    block: gl.constexpr, scale: gl.constexpr, causal: gl.constexpr, window: gl.constexpr, rows: gl.constexpr,
    tile: gl.constexpr, stages: gl.constexpr, queries: gl.constexpr, registers: gl.constexpr, near: gl.constexpr,
    order: gl.constexpr, overlap: gl.constexpr = False,
):  # fmt: skip
    """Any grid (P, 1, 1): its programs share the H x `tiles` pairs of head and query tile; out is [T, H, D].

    k and v of the tokens are in the cache already. A tile whose row is below 0 is padding.
    """
    if overlap:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    kind: gl.constexpr = q.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([tile, dim], kind)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    memory = (
        gl.allocate_shared_memory(kind, [queries, rows, dim], shared),
        gl.allocate_shared_memory(kind, [stages, tile, dim], shared),
        gl.allocate_shared_memory(kind, [stages, tile, dim], shared),
    )
    bars = (
        gl.allocate_shared_memory(gl.int64, [queries, 1], bar), gl.allocate_shared_memory(gl.int64, [queries, 1], bar),
        gl.allocate_shared_memory(gl.int64, [stages, 1], bar), gl.allocate_shared_memory(gl.int64, [stages, 1], bar),
        gl.allocate_shared_memory(gl.int64, [stages, 1], bar), gl.allocate_shared_memory(gl.int64, [stages, 1], bar),
        gl.allocate_shared_memory(gl.int64, [2, 1], bar),
    )  # fmt: skip
    for slot in gl.static_range(queries):
        mbarrier.init(bars[0].index(slot), count=THREADS)
        mbarrier.init(bars[1].index(slot), count=2)  # both groups that multiply
    for stage in gl.static_range(stages):
        for full in gl.static_range(2, 6, 2):
            mbarrier.init(bars[full].index(stage), count=THREADS)
            mbarrier.init(bars[full + 1].index(stage), count=2)
    mbarrier.init(bars[6].index(0), count=1)
    mbarrier.init(bars[6].index(1), count=1)
    data = (q, k_cache, v_cache, out, block_ids, block_begins, sinks)
    lists = (past_lens, seq_begins, tile_rows, tile_starts, prefix)
    pairs = tiles * heads
    gl.warp_specialize(
        [
            (_multiply, (0, memory, bars, data, lists, pairs, heads, dim, scale, causal, window, rows, tile, stages,
                         queries, near, order)),
            (_multiply, (1, memory, bars, data, lists, pairs, heads, dim, scale, causal, window, rows, tile, stages,
                         queries, near, order)),
            (_copy, (memory, bars, data, lists, pairs, q_row, q_head, heads, groups, dim, block, causal, window, rows,
                     tile, stages, queries, near)),
        ],
        [4, 4],
        [registers, 504 - 2 * registers],  # of 65536, for 3 x 128 threads in steps of 8: 168 each on the whole
    )  # fmt: skip
