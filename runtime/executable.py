"""What the scheduler asks of a backend: run a batch of named arrays over a cache that the backend owns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

# What the engine fills for a packed decoder; what else a plan asks for comes from the caller, one value a sequence.
PACKED = (
    "tokens", "positions", "rows", "lengths", "past_lens", "seq_begins", "block_ids", "block_begins", "max_context",
    "select",
)  # fmt: skip
PADDED = ("tokens", "positions", "rows", "lengths")  # and for an encoder, [B, S]
LIKELIEST: Ints = np.zeros(0, np.int32)  # the `how` of a step that draws nothing, see Picks


class Executable(Protocol):
    """A loaded plan with its caches; `blocks` of `block_size` tokens each, 0 where the model has no cache."""

    @property
    def block_size(self) -> int:
        """Tokens in a block."""

    @property
    def blocks(self) -> int:
        """Blocks in the cache."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches."""

    def execute(self, batch: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run once; an array that is the same object as in the last call is read where it lies, not bound again.

        The outputs are views that the next call overwrites: copy what is kept.
        """

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks of the cache, in all layers, each to the other, before the next run."""

    def close(self) -> None:
        """Give back everything that is held; nothing can be run afterwards."""


@runtime_checkable
class Picks(Protocol):
    """What an executable also has where it can choose tokens next to the logits, which then stay where they are.

    `how` says what is wanted of each selected row, as runtime.sampling.how_words has it; empty: the likeliest of each.
    """

    def pick(self, batch: Mapping[str, Array], how: Ints = LIKELIEST) -> Ints:
        """Run once; a token of each selected row, below 0 where its logits have a NaN."""


@runtime_checkable
class Ahead(Picks, Protocol):
    """What an executable also has where a step can be put behind one whose tokens nobody has read yet.

    Steps run in the order of their launches, so what a later one writes can't reach an earlier one.
    """

    @property
    def stages(self) -> int:
        """Steps that the device works on at the same time: those of a pipeline's stages, else 1."""

    def launch(
        self, batch: Mapping[str, Array], sources: Sequence[int] = (), how: Ints = LIKELIEST, behind: int = 1
    ) -> int:
        """Start a step and give its ticket; the batch's arrays may change as soon as it returns.

        Its first tokens, one for each of `sources`, are those that the launch before chose for these of its selected
        rows, or an earlier one: `behind` counts back, up to `stages`. Where a source is -1, and behind them, `tokens`
        has the token.
        """

    def wait(self, ticket: int) -> Ints:
        """What `pick` would have given, once the step is done; good until launch `stages` + 1 behind it."""
