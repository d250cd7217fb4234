"""Sets of pinned memory, in turn: while the GPU reads or fills one, the host writes the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.cuda.driver import Device
from runtime.executable import Ints


@dataclass
class Turn:
    """Where the arrays of a step are written, and where its chosen tokens arrive once the stream has passed `done`."""

    staging: Ints
    picked: Ints
    count: int = 0
    done: Any = None


class Turns:
    """Gives the sets out; the numbers of the steps that have them are tickets."""

    def __init__(self, device: Device, block_bytes: int, token_bytes: int, count: int = 2) -> None:
        """Allocate them: so many bytes for the arrays of a step and for its tokens."""
        self._device = device
        self._turns = [
            Turn(device.pinned(block_bytes).view(np.int32), device.pinned(token_bytes).view(np.int32))
            for _ in range(count)
        ]
        self._given = 0

    def take(self) -> Turn:
        """The set that was given out longer ago, once the GPU is done with it: also where nobody waited for that."""
        self._given += 1
        return self._passed(self._turns[self._given % len(self._turns)])

    def started(self, turn: Turn, tokens: int, count: int) -> int:
        """Behind the last work of a step: copy what it chose, at a device address, and give its ticket."""
        turn.count = count
        self._device.download(turn.picked[:count], tokens)
        turn.done = self._device.event()
        return self._given

    def wait(self, ticket: int) -> Ints:
        """The tokens of a step, once they are there; their memory is given away when it is this set's turn again."""
        if not self._given - len(self._turns) < ticket <= self._given:
            raise AssertionError(f"ticket {ticket} where the last is {self._given}")
        turn = self._passed(self._turns[ticket % len(self._turns)])
        return turn.picked[: turn.count]

    def close(self) -> None:
        """Wait for what is on its way."""
        for turn in self._turns:
            self._passed(turn)

    def _passed(self, turn: Turn) -> Turn:
        if turn.done is not None:
            # the device's own wait, not the stream's: what was launched behind this step goes on
            self._device.passed(turn.done)
            turn.done = None
        return turn
