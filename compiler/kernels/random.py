"""Random weights, made on the device: a benchmark of a large model then needs no file of its size."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normal(out, count, seed, mean: tl.constexpr, tile: tl.constexpr):
    """Grid (count / tile,): normal numbers of deviation 0.02 around `mean`; equal for equal seeds (Philox)."""
    at = tl.program_id(0) * tile + tl.arange(0, tile)
    x = tl.randn(seed, at) * 0.02 + mean
    tl.store(out + at, x.to(out.dtype.element_ty), mask=at < count)


@triton.jit
def codes(out, count, seed, keep: tl.constexpr, add: tl.constexpr, tile: tl.constexpr):
    """Grid (count / tile,): words of random bits, those of `keep` kept, those of `add` set; equal for equal seeds."""
    at = tl.program_id(0) * tile + tl.arange(0, tile)
    bits = tl.randint(seed, at).to(tl.int32, bitcast=True)
    tl.store(out + at, (bits & keep) | add, mask=at < count)
