"""A token drawn from a row of logits: temperature, top-k, top-p, then where a random number falls.

Order and meaning are those of runtime/sampling.py. Nothing is sorted: a float's bits, in order, are a number of 32
bits, and the least that is kept is found digit by digit, by what lies below each of 16 candidates.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_of(x):
    """float32 as unsigned numbers in the same order; both zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def number_at(key):
    """The float32 that has a key."""
    bits = (key ^ 0x80000000).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def part_of(logits, first, top, temperature, least, vocab: tl.constexpr, tile: tl.constexpr):
    """Keys and weights of logits `first`.. [tile], and which of them there are from the key `least` on."""
    at = first + tl.arange(0, tile)
    x = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    key = key_of(x)
    kept = (at < vocab) & (key >= least)
    return key, tl.where(kept, tl.exp(x / temperature - top / temperature), 0.0), kept


@triton.jit
def edge(
    logits, top, temperature, least, limit, vocab: tl.constexpr, tile: tl.constexpr, counted: tl.constexpr
):  # fmt: skip
    """The greatest key below which there is at most `limit`, of weights or of logits, and how much that is.

    Only logits from the key `least` on count.
    """
    digit = tl.arange(0, 16).to(tl.uint32)
    found = least * 0
    under = limit * 0.0
    for step in range(8):
        candidates = digit << (28 - 4 * step)
        ends = found + candidates
        below = tl.zeros([16], tl.float32)
        for first in range(0, vocab, tile):
            key, weight, kept = part_of(logits, first, top, temperature, least, vocab, tile)
            if counted:
                weight = kept.to(tl.float32)
            below += tl.sum(tl.where(key[:, None] < ends[None, :], weight[:, None], 0.0), 0)
        fits = (below <= limit) & (ends <= key_of(top))  # the likeliest stays, however the sums were rounded
        found += tl.sum(tl.where(digit == tl.sum(fits.to(tl.int32), 0) - 1, candidates, 0), 0)
        under = tl.max(tl.where(fits, below, 0.0), 0)
    return found, under


@triton.jit
def mass(logits, top, temperature, least, vocab: tl.constexpr, tile: tl.constexpr):
    """The weights of all logits from the key `least` on."""
    total = tl.zeros([tile], tl.float32)
    for first in range(0, vocab, tile):
        _, weight, _ = part_of(logits, first, top, temperature, least, vocab, tile)
        total += weight
    return tl.sum(total, 0)


@triton.jit
def draw(logits, top, temperature, top_k, top_p, chance, vocab: tl.constexpr, tile: tl.constexpr):
    """The token at `chance`, in [0, 1), of the weights of what top-k (0: all) and top-p leave, in order of ids."""
    least = (top_k * 0).to(tl.uint32)
    if (top_k > 0) & (top_k < vocab):
        least, _ = edge(logits, top, temperature, least, (vocab - top_k).to(tl.float32), vocab, tile, True)
    total = mass(logits, top, temperature, least, vocab, tile)
    drop = top_k * 0  # of those at the edge, by id: a stable sort has them first
    if top_p < 1:
        limit = (1 - top_p) * total
        least, under = edge(logits, top, temperature, least, limit, vocab, tile, False)
        weight = tl.exp(number_at(least) / temperature - top / temperature)
        drop = tl.floor((limit - under) / weight).to(tl.int32)
        total -= under + drop * weight
    goal = chance * total
    passed = goal * 0.0
    same = drop * 0
    found = drop * 0 + vocab
    last = drop * 0 - 1
    for first in range(0, vocab, tile):
        key, weight, kept = part_of(logits, first, top, temperature, least, vocab, tile)
        at = first + tl.arange(0, tile)
        tie = kept & (key == least)
        rank = same + tl.cumsum(tie.to(tl.int32), 0)
        kept = kept & ((key != least) | (rank > drop))
        weight = tl.where(kept, weight, 0.0)
        beyond = passed + tl.cumsum(weight, 0) > goal
        found = tl.minimum(found, tl.min(tl.where(kept & beyond, at, vocab), 0))
        last = tl.maximum(last, tl.max(tl.where(kept | tie, at, -1), 0))
        passed += tl.sum(weight, 0)
        same += tl.sum(tie.to(tl.int32), 0)
    return tl.where(found < vocab, found, last)  # the sum may end below the goal, and all that is equal be dropped
