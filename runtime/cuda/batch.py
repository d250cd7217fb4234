"""What a step needs to know of its batch, as one block of int32: the inputs and what the kernels read beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.executable import Array, Ints

WORD = 4  # bytes
PROMPT_STEP, PROMPT_MOST = 64, 1024  # tokens: sizes of prompts that are captured
VECTOR = 64  # words between the starts of arrays: 256 bytes, as in the arena
SPLITS = (1, 2, 4, 8, 16, 32)  # as the kernels were compiled: compiler/kernels/attention.py
LEAST_KEYS = 64  # of a split, likewise
L2_BYTES = 40 << 20  # of 50 MB that sm_90 has, the rest for queries and results
_NOBODY: Ints = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Layout:
    """Where each array begins in the block, in words, and how long the block is."""

    starts: Mapping[str, int]
    sizes: Mapping[str, int]
    words: int


def layout(sizes: Mapping[str, int]) -> Layout:
    """Arrays one after the other."""
    starts: dict[str, int] = {}
    words = 0
    for name, size in sizes.items():
        starts[name] = words
        words += -(-max(size, 1) // VECTOR) * VECTOR
    return Layout(starts, dict(sizes), words)


def fill(block: Ints, made: Layout, arrays: Mapping[str, Array], padding: Mapping[str, int]) -> None:
    """Write arrays into the block; a shorter one than the layout's is followed by its padding, by default 0."""
    for name, start in made.starts.items():
        array, size = arrays[name].reshape(-1), made.sizes[name]
        if array.dtype.kind == "f":
            array = array.view(np.int32)  # its bits
        block[start : start + len(array)] = array
        if len(array) < size:
            block[start + len(array) : start + size] = padding.get(name, 0)


@dataclass(frozen=True)
class Shape:
    """Sizes of a captured step: tokens, sequences, rows of logits, sequences that decode, query tiles of the others."""

    tokens: int
    sequences: int
    rows: int
    singles: int
    tiles: int


def buckets(most: int) -> list[int]:
    """Sizes of decode batches that get a graph each: steps of 8 up to 64, where a row costs little, then of 32."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(96, most + 32, 32)]
    return sorted({min(size, most) for size in sizes})


def shape_of(dims: Mapping[str, int], singles: int, sizes: Sequence[int], tile: int, most: int) -> Shape | None:
    """The least captured shape that holds a batch; None for one that is put into the stream step by step.

    Captured are decode steps, and prompts of one sequence, whose engines take less time than starting them would.
    """
    tokens, sequences, rows = dims["T"], dims["B"], dims["N"]
    if singles == sequences == rows:
        size = next((size for size in sizes if size >= sequences), None)
        return None if size is None else Shape(size, size, size, size, 0)
    padded = -(-tokens // PROMPT_STEP) * PROMPT_STEP
    if sequences == rows == 1 and sizes and padded <= min(PROMPT_MOST, most):
        return Shape(padded, 1, 1, 0, -(-padded // tile))
    return None


def slots(batch: Mapping[str, Array], block_size: int) -> Ints:
    """Where each token's key and value go: block id times block_size plus the place in the block."""
    begins, at = batch["seq_begins"], batch["positions"]
    first = batch["block_begins"][:-1]
    if len(at) > len(first):  # else one token each
        first = np.repeat(first, np.diff(begins))
    block = batch["block_ids"][first + at // block_size]
    result: Ints = (block * block_size + at % block_size).astype(np.int32)
    return result


def leading_singles(seq_begins: Array) -> int:
    """How many sequences, from the first on, have one new token: those that decode."""
    if seq_begins[-1] == len(seq_begins) - 1:
        return len(seq_begins) - 1
    several = np.flatnonzero(np.diff(seq_begins) != 1)
    return int(several[0]) if len(several) else len(seq_begins) - 1


def query_tiles(batch: Mapping[str, Array], first: int, rows: int) -> tuple[Ints, Ints]:
    """Sequence and first token of each tile of `rows` query tokens, of the sequences from `first` on.

    Tiles that see the most keys come first: the GPU starts them in this order, and short ones fill the end.
    """
    if first == len(batch["past_lens"]):
        return _NOBODY, _NOBODY
    count, past = np.diff(batch["seq_begins"])[first:], batch["past_lens"][first:]
    tiles = -(-count // rows)
    row = np.repeat(np.arange(len(count)), tiles)
    start = (np.arange(len(row)) - np.repeat(np.cumsum(tiles) - tiles, tiles)) * rows
    order = np.argsort(-(past[row] + start), kind="stable")
    return (row[order] + first).astype(np.int32), start[order].astype(np.int32)


def programs_for(heads: int, tiles: int, sequences: int, context: int, head_bytes: int, multiprocessors: int) -> int:
    """How many programs share the pairs of head and query tile: one for each multiprocessor, which go on to the next.

    Where those at work would read more keys and values (of `head_bytes` a token, all heads) than the L2 cache holds,
    there is one for each pair, and the kernel orders them so that few heads are at work at a time.
    """
    at_work = min(sequences, -(-multiprocessors // heads))
    pairs = heads * tiles
    return pairs if at_work * context * head_bytes > L2_BYTES else min(pairs, multiprocessors)


def splits_for(sequences: int, groups: int, tiles: int, multiprocessors: int) -> int:
    """How often decode attention cuts the keys: until each multiprocessor has four blocks, or a tile is left.

    `tiles` are of LEAST_KEYS.
    """
    wanted = -(-4 * multiprocessors // max(1, sequences * groups))
    return max(split for split in SPLITS if split == 1 or (split <= wanted and split <= tiles))
