"""The reference meaning of several graphs at once, one for each rank: threads that meet at every exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import TypeVar

import torch

from compiler.ir.core import Graph
from compiler.ir.interpreter import Weights, run
from compiler.ir.ops.exchange import SWAP

Of = TypeVar("Of")


def at_once(count: int, work: Callable[[int], Of]) -> list[Of]:
    """What `work(rank)` gives for each of so many ranks, in threads whose exchanges meet; raises what one raises."""
    barrier = Barrier(count)
    given: list[torch.Tensor | None] = [None] * count

    def one(rank: int) -> Of:
        def swap(x: torch.Tensor) -> list[torch.Tensor]:
            given[rank] = x
            barrier.wait()
            found = [other for other in given if other is not None]
            barrier.wait()  # before anybody gives the next
            return found

        SWAP.set(swap)
        try:
            return work(rank)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        running = [pool.submit(one, rank) for rank in range(count)]
    errors = [error for future in running if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):  # those only wait for others
        raise error
    return [future.result() for future in running]


def run_ranks(
    graphs: Sequence[Graph],
    inputs: Mapping[str, torch.Tensor],
    weights: Weights,
    states: Sequence[MutableMapping[str, torch.Tensor]] | None = None,
) -> dict[str, torch.Tensor]:
    """The outputs by name, the same on all ranks; `states` has the buffers of each. See compiler.ir.interpreter.run.

    Raises ValueError where the ranks' outputs differ; what a rank raises.
    """
    first, *others = at_once(
        len(graphs), lambda rank: run(graphs[rank], inputs, weights, None if states is None else states[rank])
    )
    for rank, other in enumerate(others, 1):
        for name, value in first.items():
            if not torch.equal(value, other[name]):
                raise ValueError(f"`{name}` of rank {rank} is not that of rank 0")
    return first
