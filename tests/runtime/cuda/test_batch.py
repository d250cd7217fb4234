"""The numbers of a step: where tokens go in the cache, who decodes, tiles, buckets, and the block that carries them."""

from __future__ import annotations

import numpy as np
import pytest

from compiler.kernels.attention import LEAST_KEYS
from compiler.kernels.attention import SPLITS as COMPILED
from runtime.cuda import batch as lib


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


# two decode (at 5 and 33), one is a prompt of 20, one the second part of one, 16 of its 40
BATCH = {
    "positions": ints(5, 33, *range(20), *range(16, 32)), "past_lens": ints(5, 33, 0, 16),
    "seq_begins": ints(0, 1, 2, 22, 38), "block_ids": ints(9, 4, 2, 7, 0, 8, 1, 3), "block_begins": ints(0, 1, 4, 6, 8),
}  # fmt: skip


def test_slots() -> None:
    expected = [9 * 16 + 5, 7 * 16 + 1]
    expected += [0 * 16 + at if at < 16 else 8 * 16 + at - 16 for at in range(20)]
    expected += [3 * 16 + at for at in range(16)]
    assert lib.slots(BATCH, 16).tolist() == expected


def test_those_that_decode_come_first() -> None:
    assert lib.leading_singles(BATCH["seq_begins"]) == 2
    assert lib.leading_singles(ints(0, 1, 2)) == 2
    assert lib.leading_singles(ints(0, 3, 4)) == 0


def test_tiles_cover_each_token_once_the_longest_first() -> None:
    rows, starts = lib.query_tiles(BATCH, 2, 8)
    assert sorted(zip(rows.tolist(), starts.tolist(), strict=True)) == [(2, 0), (2, 8), (2, 16), (3, 0), (3, 8)]
    seen = [int(BATCH["past_lens"][row] + start) for row, start in zip(rows, starts, strict=True)]
    assert seen == sorted(seen, reverse=True)


def test_programs_of_prompts() -> None:
    """Each multiprocessor has one, unless all heads' keys and values of what is at work are more than the L2 holds."""
    seven = {"heads": 32, "head_bytes": 4 * 32 * 128, "multiprocessors": 132}
    assert lib.programs_for(tiles=16, sequences=1, context=2048, **seven) == 132
    assert lib.programs_for(tiles=64, sequences=4, context=2048, **seven) == 32 * 64
    assert lib.programs_for(tiles=64, sequences=64, context=128, **seven) == 132
    assert lib.programs_for(tiles=64, sequences=1, context=8192, **seven) == 32 * 64
    assert lib.programs_for(tiles=64, sequences=4, context=2048, **seven | {"head_bytes": 4 * 8 * 128}) == 132
    assert lib.programs_for(tiles=2, sequences=1, context=256, **seven) == 64


def test_buckets() -> None:
    assert lib.buckets(1) == [1]
    assert lib.buckets(20) == [1, 2, 4, 8, 16, 20]
    assert lib.buckets(100) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 96, 100]


def test_shapes_that_are_captured() -> None:
    def shape(tokens: int, sequences: int, rows: int, singles: int) -> lib.Shape | None:
        return lib.shape_of({"T": tokens, "B": sequences, "N": rows}, singles, lib.buckets(100), 128, 2048)

    found = [shape(count, count, count, count) for count in (1, 3, 9, 64, 65, 100, 101)]
    assert [one and one.tokens for one in found] == [1, 4, 16, 64, 96, 100, None]
    assert shape(130, 1, 1, 0) == lib.Shape(192, 1, 1, 0, 2)
    assert shape(1500, 1, 1, 0) is None  # the GPU is busy longer than the host
    assert shape(130, 1, 130, 0) is None  # all logits are wanted
    assert shape(130, 2, 2, 1) is None
    assert lib.shape_of({"T": 1, "B": 1, "N": 1}, 1, [], 128, 2048) is None  # graphs are off


def test_a_short_batch_is_padded_in_the_block() -> None:
    made = lib.layout({"tokens": 4, "max_context": 1, "past_lens": 4, "shift": 2})
    block = np.full(made.words, 77, np.int32)
    arrays = {"tokens": ints(1, 2), "max_context": np.array(9, np.int32), "past_lens": ints(3, 4),
              "shift": np.array([0.5, -2], np.float32)}  # fmt: skip
    lib.fill(block, made, arrays, {"past_lens": -1})
    found = {name: block[start : start + made.sizes[name]].tolist() for name, start in made.starts.items()}
    assert np.array(found.pop("shift"), np.int32).view(np.float32).tolist() == [0.5, -2]
    assert found == {"tokens": [1, 2, 0, 0], "max_context": [9], "past_lens": [3, 4, -1, -1]}
    assert all(start % lib.VECTOR == 0 for start in made.starts.values())


@pytest.mark.parametrize(
    ("sequences", "groups", "tiles", "expected"), [(1, 32, 100, 16), (1, 32, 5, 4), (64, 32, 100, 1), (1, 1, 1000, 32)]
)
def test_splits(sequences: int, groups: int, tiles: int, expected: int) -> None:
    assert (lib.SPLITS, lib.LEAST_KEYS) == (COMPILED, LEAST_KEYS)  # the runtime imports nothing of the compiler
    assert lib.splits_for(sequences, groups, tiles, 132) == expected
