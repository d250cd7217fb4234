"""How a packed step becomes calls over neighbouring slots, and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.cache import BlockAllocator
from runtime.native import Slots, merged
from runtime.program import Port

PLACES = 128
TOKENWISE = ("tokens", "positions", "rows")
PORTS = [*(Port(name, "i32", ("B", "S")) for name in TOKENWISE), Port("past_lens", "i32", ("B",)),
         Port("prefix", "i32", ("B",)), Port("select", "i32", ("N",))]  # fmt: skip


def step(*sequences: tuple[int, int, int], select: list[int]) -> dict[str, Any]:
    """A batch of sequences (slot, past, new tokens); token ids tell the slot and the place."""
    begins = np.cumsum([0, *(new for _, _, new in sequences)])
    found = {
        "tokens": [100 * slot + past + at for slot, past, new in sequences for at in range(new)],
        "positions": [past + at for _, past, new in sequences for at in range(new)],
        "rows": [row for row, (_, _, new) in enumerate(sequences) for _ in range(new)],
        "past_lens": [past for _, past, _ in sequences], "seq_begins": begins,
        "block_ids": [slot for slot, _, _ in sequences], "block_begins": range(len(sequences) + 1),
        "prefix": [slot + 1 for slot, _, _ in sequences], "select": select,
    }  # fmt: skip
    return {name: np.array(values, np.int32) for name, values in found.items()}


def test_sequences_that_decode_are_one_call_and_each_prompt_is_one() -> None:
    slots = Slots(PORTS, 6, PLACES)
    (prompt,) = slots.calls(step((3, 0, 4), select=[3]))
    assert (prompt.first, prompt.sequences, prompt.tokens) == (3, 1, 4)
    assert prompt.arrays["tokens"].tolist() == [[300, 301, 302, 303]]
    assert (prompt.arrays["select"].tolist(), prompt.to.tolist()) == ([3], [0])

    # out of the slots' order, a prompt between; slot 3 runs along and slot 2 is nobody's
    decode, prompt = slots.calls(step((4, 7, 1), (0, 2, 3), (1, 9, 1), select=[0, 2, 3, 4]))
    assert (decode.first, decode.sequences, decode.tokens) == (1, 4, 1)
    assert decode.arrays["tokens"].tolist() == [[109], [0], [0], [407]]
    assert decode.arrays["past_lens"].tolist() == [9, 0, 4, 7]  # what slot 3 holds is left alone
    assert decode.arrays["positions"].tolist() == [[9], [0], [4], [7]]
    assert decode.arrays["rows"].tolist() == [[0], [1], [2], [3]]
    assert decode.arrays["prefix"].tolist() == [2, 0, 0, 5]
    assert (decode.arrays["select"].tolist(), decode.to.tolist()) == ([3, 0], [0, 3])
    assert prompt.arrays["positions"].tolist() == [[2, 3, 4]]
    assert prompt.arrays["rows"].tolist() == [[0, 0, 0]]
    assert (prompt.arrays["select"].tolist(), prompt.to.tolist()) == ([1, 2], [1, 2])

    found = merged([decode, prompt], [np.array([[40.0], [10.0]]), np.array([[1.0], [2.0]])], 4)
    assert found[:, 0].tolist() == [40.0, 1.0, 2.0, 10.0]
    assert merged([decode, prompt], [np.array([4, 1]), np.array([2, 3])], 4).tolist() == [4, 2, 3, 1]


def test_decode_calls_of_sizes_that_have_a_graph() -> None:
    """They begin at the first slot, and select a row for each: addresses and shapes are those of the graph."""
    slots = Slots(PORTS, 6, PLACES, [1, 2, 4, 6])
    slots.calls(step((1, 0, 9), select=[8]))
    (decode,) = slots.calls(step((3, 5, 1), (2, 7, 1), select=[1]))
    assert (decode.first, decode.sequences, decode.tokens) == (0, 4, 1)
    assert decode.arrays["tokens"].tolist() == [[0], [0], [207], [305]]
    assert decode.arrays["past_lens"].tolist() == [0, 9, 7, 5]  # what slot 1 holds is left alone
    assert (decode.arrays["select"].tolist(), decode.to.tolist()) == ([2, 0, 0, 0], [0])
    idle = slots.idle(4)
    assert {name: array.shape for name, array in idle.arrays.items()} == {
        name: array.shape for name, array in decode.arrays.items()
    }
    assert (idle.first, idle.sequences, idle.tokens, len(idle.to)) == (0, 4, 1, 0)
    assert [slots.calls(step((slot, 5, 1), select=[0]))[0].sequences for slot in range(6)] == [1, 2, 4, 4, 6, 6]


def test_the_lowest_free_slots_are_taken() -> None:
    slots = BlockAllocator(5)
    assert slots.take(4) == [0, 1, 2, 3]
    slots.give([2])
    slots.give([0])
    assert (slots.take(1), slots.take(3), slots.take(2), slots.free) == ([0], None, [2, 4], 0)


def test_a_piece_of_a_prompt_of_which_nothing_is_wanted() -> None:
    (call,) = Slots(PORTS, 2, PLACES).calls(step((1, 0, 3), select=[]))
    assert (call.arrays["select"].tolist(), len(call.to)) == ([0], 0)  # an engine gives a row; nobody reads it
    assert merged([call], [np.ones((1, 5))], 1).tolist() == [[0.0] * 5]


def test_the_last_place_is_never_written() -> None:
    slots = Slots(PORTS, 3, PLACES)
    slots.calls(step((1, 0, PLACES - 1), select=[0]))
    (decode,) = slots.calls(step((0, 5, 1), (2, 5, 1), select=[0, 1]))
    assert decode.arrays["past_lens"].tolist() == [5, PLACES - 2, 5]
