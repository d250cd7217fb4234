"""The token of each row of logits, the likeliest or a drawn one, and where the next step reads it."""

from __future__ import annotations

import triton
import triton.language as tl

from compiler.kernels.draw import draw
from compiler.kernels.overlap import wait


@triton.jit
def choose(
    logits, how, tokens, vocab: tl.constexpr, tile: tl.constexpr, part: tl.constexpr, overlap: tl.constexpr = False
):  # fmt: skip
    """Grid (R,): tokens i32[R] of logits [R, V]; -1 where one is NaN.

    `how` is [R, 4] words: temperature in float32, top-k, top-p and a random number in float32. At temperature 0 it is
    the first of the greatest logits, as numpy's argmax.
    """
    wait(overlap)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, tile)
    best = tl.full([tile], float("-inf"), tl.float32)
    where = at
    broken = tl.zeros([tile], tl.int32)
    for first in range(0, vocab, tile):
        inside = first + at < vocab
        x = tl.load(logits + row * vocab + first + at, mask=inside, other=float("-inf")).to(tl.float32)
        broken = tl.where(x != x, 1, broken)
        better = x > best
        best = tl.where(better, x, best)
        where = tl.where(better, first + at, where)
    greatest = tl.max(best, 0)
    token = tl.min(tl.where(best == greatest, where, vocab), 0)
    temperature = tl.load(how + 4 * row).to(tl.float32, bitcast=True)
    if temperature > 0:
        top_k = tl.load(how + 4 * row + 1)
        top_p = tl.load(how + 4 * row + 2).to(tl.float32, bitcast=True)
        chance = tl.load(how + 4 * row + 3).to(tl.float32, bitcast=True)
        token = draw(logits + row * vocab, greatest, temperature, top_k, top_p, chance, vocab, part)
    tl.store(tokens + row, tl.where(tl.max(broken, 0) > 0, -1, token))


@triton.jit
def carry(chosen, sources, tokens, count, tile: tl.constexpr, overlap: tl.constexpr = False):
    """Grid (count / tile,): tokens i32[count] become chosen i32[R] at sources i32[count], where these are no -1.

    A chosen -1, of NaN, becomes 0: the host has not seen it yet, and the embedding must get an id.
    """
    wait(overlap)
    at = tl.program_id(0) * tile + tl.arange(0, tile)
    source = tl.load(sources + at, mask=at < count, other=-1)
    token = tl.load(chosen + source, mask=source >= 0, other=0)
    tl.store(tokens + at, tl.maximum(token, 0), mask=source >= 0)
