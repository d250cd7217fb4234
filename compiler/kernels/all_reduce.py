"""The sum over all ranks in one launch: each rank writes its numbers to the others' memory, and adds up what arrives.

A rank has a room for what each rank sends it, twice: launches take turns. A room is full of EMPTY before numbers come,
and again once they are read, so the numbers say themselves that they are there: no flags, no fences, and a number
crosses NVLink once. EMPTY is the NaN of all bits set; the same NaN among the numbers is sent as another one.

Blocks of the same number belong together over the ranks, each with its own part of the rooms and its own turn in device
memory, which goes on where a captured graph is replayed. Two rooms are enough: who writes into the one of two turns ago
has read what the other sent at the last turn, in a launch that began when the launch before it, which emptied that
room, had ended; and at its end all that a launch wrote is in its GPU's memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compiler.kernels.overlap import wait

EMPTY = tl.constexpr(-1)


@triton.jit
def all_reduce(
    source, target, turns, stop, room_0, room_1, room_2, room_3, room_4, room_5, room_6, room_7, own, count, rank,
    unit: tl.constexpr, ranks: tl.constexpr, size: tl.constexpr, tile: tl.constexpr, overlap: tl.constexpr = False,
):  # fmt: skip
    """Grid (count * unit / tile,): the sum of all ranks' `source`, in float32 and in the order of ranks, in `target`.

    `room_0`.. are each rank's rooms, integers [2, ranks, size] that are EMPTY at first, `own` those of this rank;
    `turns` [size / tile] are 0 at first. All ranks make the same launches in the same order, and get the same bits.
    Where `stop` [1] is not 0, a rank failed: nobody is waited for, and the sums mean nothing.
    """
    rooms = (room_0, room_1, room_2, room_3, room_4, room_5, room_6, room_7)
    number: tl.constexpr = source.dtype.element_ty
    kind: tl.constexpr = own.dtype.element_ty
    wait(overlap)
    block = tl.program_id(0)
    at = block * tile + tl.arange(0, tile)
    numbers = count * unit
    inside = at < numbers
    turn = tl.load(turns + block)
    begin = turn * ranks * size
    mine = tl.load(source + at, mask=inside, other=0.0).to(kind, bitcast=True)
    mine = tl.where(mine == EMPTY, 2 ** (kind.primitive_bitwidth - 1) - 1, mine).to(kind)
    for other in tl.static_range(ranks):
        sent = at < tl.where(rank == other, 0, numbers)  # nobody sends anything to itself
        tl.atomic_store(rooms[other] + (begin + rank * size) + at, mine, mask=sent, sem="relaxed", scope="sys")
    total = tl.zeros([tile], tl.float32)
    missing = 1
    while missing > 0:
        empty = at < 0
        total = tl.zeros([tile], tl.float32)
        for other in tl.static_range(ranks):
            sent = at < tl.where(rank == other, 0, numbers)
            word = tl.atomic_load(own + (begin + other * size) + at, mask=sent, sem="relaxed", scope="sys")
            word = tl.where(sent, word, mine)
            empty = empty | (word == EMPTY)
            total += word.to(number, bitcast=True).to(tl.float32)
        going = tl.load(stop, volatile=True) == 0
        missing = tl.max((empty & going).to(tl.int32), 0)
    tl.store(target + at, total.to(number), mask=inside)
    for other in tl.static_range(ranks):
        sent = at < tl.where(rank == other, 0, numbers)
        tl.store(own + (begin + other * size) + at, tl.full([tile], EMPTY, kind), mask=sent)
    tl.debug_barrier()  # all threads have read the turn
    tl.store(turns + block, 1 - turn)
