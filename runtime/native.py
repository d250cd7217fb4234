"""Calls of a decoder that is one engine over a linear cache: what the scheduler packs, as padded batches over slots.

A slot is a row of the cache, and a block of the scheduler: a sequence has one. A call is of neighbouring slots. All
sequences that decode are one call, where there are graphs of the first slots up to a size that has one; between them
may be slots of others, or of nobody: their row runs along, and writes to a place that nobody will read. The tokens of a
prompt are a call of its own, of one slot: so no row has padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.executable import Array, Ints
from runtime.program import Port


@dataclass(frozen=True)
class Call:
    """The arrays of one call by input, the first of its slots, and where its rows of logits belong in the step's."""

    first: int
    sequences: int
    tokens: int
    arrays: Mapping[str, Array]
    to: Ints  # may be empty: an engine gives a row in any case, and nobody reads it then


class Slots:
    """Knows how many places of each slot are taken, also of those that have no part in a step."""

    def __init__(self, inputs: Sequence[Port], slots: int, places: int, sizes: Sequence[int] = ()) -> None:
        """`sizes`: of the decode calls that are wanted, in order, the last with all slots; none: any size."""
        self._shapes = {port.name: port.shape for port in inputs}
        self._sizes = sizes
        self._taken = np.zeros(slots, np.int32)
        self._spare = places - 2  # the last place stays zero; where this is taken too, its sequence has ended

    def calls(self, batch: Mapping[str, Array]) -> list[Call]:
        """The calls of a step, which the scheduler packed as runtime.executable.PACKED; they are run in this order."""
        begins, past = batch["seq_begins"], batch["past_lens"]
        counts = np.diff(begins)
        slots = batch["block_ids"][batch["block_begins"][:-1]]
        decoding = np.flatnonzero(counts == 1)
        found = [self._decode(batch, decoding, slots)] if len(decoding) else []
        found += [self._prompt(batch, int(row), int(slots[row])) for row in np.flatnonzero(counts > 1)]
        self._taken[slots] = past + counts
        return found

    def idle(self, size: int) -> Call:
        """A decode call of the first slots in which nobody takes part."""
        nobody = np.zeros(size, np.int32)
        arrays: dict[str, Array] = {"select": nobody}
        for name, shape in self._shapes.items():
            if shape == ("B", "S"):
                arrays[name] = nobody[:, None]
            elif shape == ("B",):
                arrays[name] = np.arange(size, dtype=np.int32) if name == "rows" else nobody
        return Call(0, size, 1, arrays, nobody[:0])

    def _prompt(self, batch: Mapping[str, Array], row: int, slot: int) -> Call:
        start, stop = (int(at) for at in batch["seq_begins"][row : row + 2])
        arrays: dict[str, Array] = {}
        for name, shape in self._shapes.items():
            if shape == ("B", "S"):
                arrays[name] = batch[name][None, start:stop]
            elif shape == ("B",):
                arrays[name] = batch[name][row : row + 1]
        if "rows" in arrays:
            arrays["rows"] = np.zeros_like(arrays["rows"])
        select = batch["select"]
        to = np.flatnonzero((start <= select) & (select < stop))
        arrays["select"] = (select[to] - start if len(to) else np.zeros(1, np.int32)).astype(np.int32)
        return Call(slot, 1, stop - start, arrays, to.astype(np.int32))

    def _decode(self, batch: Mapping[str, Array], rows: Array, slots: Array) -> Call:
        """One token of every sequence in `rows`."""
        mine = slots[rows]
        first, count = int(mine.min()), int(mine.max() - mine.min()) + 1
        if self._sizes:
            first, count = 0, next(size for size in self._sizes if size > mine.max())
        at = mine - first
        tokens = batch["seq_begins"][rows]  # where the packed token of each is
        spare = np.minimum(self._taken[first : first + count], self._spare)
        arrays: dict[str, Array] = {}
        for name, shape in self._shapes.items():
            if shape not in (("B", "S"), ("B",)):
                continue
            of_tokens = shape == ("B", "S")
            idle = spare if name in ("past_lens", "positions") else np.zeros(count, np.int32)
            values = idle.astype(np.int32)
            values[at] = batch[name][tokens if of_tokens else rows]
            if name == "rows":
                values = np.arange(count, dtype=np.int32)
            arrays[name] = values[:, None] if of_tokens else values
        select = batch["select"]
        order = np.searchsorted(tokens, select)
        hit = (order < len(tokens)) & (tokens[np.minimum(order, len(tokens) - 1)] == select)
        to = np.flatnonzero(hit)
        selected = np.zeros(count if self._sizes else max(len(to), 1), np.int32)
        selected[: len(to)] = at[order[to]]
        arrays["select"] = selected
        return Call(first, count, 1, arrays, to.astype(np.int32))


def merged(calls: Sequence[Call], each: Sequence[Array], rows: int) -> Array:
    """What the calls of a step gave for the rows that are wanted, in the order that the scheduler asked for them."""
    whole = np.zeros((rows, *each[0].shape[1:]), each[0].dtype)
    for call, found in zip(calls, each, strict=True):
        whole[call.to] = found[: len(call.to)]
    return whole
