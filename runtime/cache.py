"""The paged KV cache: which blocks are free, and how many blocks the memory of this machine allows."""

from __future__ import annotations

import heapq
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.program import CacheLayout
from specs.errors import SpecRTError

SHARE = 0.5  # of the free memory that a cache takes where its size is not stated


class BlockAllocator:
    """Hands out the lowest free cache blocks: a block that is a row of a sequence lies near the others.

    A block may have several users, who only read it. Blocks can be promised before somebody takes them.
    """

    def __init__(self, blocks: int) -> None:
        self.total = blocks
        self._free = list(range(blocks))  # a heap
        self._users = [0] * blocks
        self._promised = 0

    @property
    def free(self) -> int:
        """Blocks that nobody has and that are promised to nobody."""
        return len(self._free) - self._promised

    def take(self, count: int) -> list[int] | None:
        """`count` blocks, or None, and nothing taken, where there are fewer."""
        if count > self.free:
            return None
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for block in taken:
            self._users[block] = 1
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """One more user for each of some blocks that somebody has."""
        for block in blocks:
            self._users[block] += 1

    def give(self, blocks: Sequence[int]) -> int:
        """Give blocks back; those that nobody else uses are free then: how many."""
        before = len(self._free)
        for block in blocks:
            self._users[block] -= 1
            if not self._users[block]:
                heapq.heappush(self._free, block)
        return len(self._free) - before

    def promise(self, count: int) -> None:
        """Keep so many of the free blocks for somebody; below 0, fewer than before."""
        self._promised += count


class Reserve:
    """Blocks set aside for sequences that share some, so that they never wait: `count`, each counted once."""

    def __init__(self, allocator: BlockAllocator, count: int) -> None:
        """Of the free blocks, of which there must be as many."""
        assert count <= allocator.free
        self._allocator, self.left = allocator, count
        allocator.promise(count)

    def take(self, count: int) -> list[int]:
        """Blocks of those that are left."""
        assert count <= self.left
        self._keep(-count)
        taken = self._allocator.take(count)
        assert taken is not None  # they were promised
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """One more user for each of some blocks."""
        self._allocator.share(blocks)

    def give(self, blocks: Sequence[int]) -> None:
        """Put back what a sequence has; what no other uses can be taken again."""
        self._keep(self._allocator.give(blocks))

    def close(self) -> None:
        """Set nothing aside any more; blocks must be put back before."""
        self._keep(-self.left)

    def _keep(self, count: int) -> None:
        self.left += count
        self._allocator.promise(count)


@dataclass(frozen=True)
class CacheSize:
    """How large a cache was decided to be, and out of what; `available` is None where the system does not tell."""

    blocks: int
    block_size: int
    block_bytes: int
    wanted: int
    available: int | None

    @property
    def tokens(self) -> int:
        """Tokens that fit."""
        return self.blocks * self.block_size

    @property
    def bytes(self) -> int:
        """Bytes of all layers."""
        return self.blocks * self.block_bytes

    def __str__(self) -> str:
        free = "" if self.available is None else f" of {self.available / 1e6:.0f} MB free"
        return f"KV cache: {self.tokens} tokens, {self.bytes / 1e6:.0f} MB{free}"


class Cached:
    """What an executable says of its cache, whose size is `size`, None where the model has none."""

    size: CacheSize | None

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.size.block_size if self.size else 0

    @property
    def blocks(self) -> int:
        """Blocks in the cache."""
        return self.size.blocks if self.size else 0

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches."""
        return self.size.bytes if self.size else 0


def decide_size(
    layout: CacheLayout,
    *,
    max_batch: int,
    max_sequence: int,
    cache_tokens: int | None,
    available: int | None,
    share: float = SHARE,
) -> CacheSize:
    """The size of a cache, before it is allocated: what the limits can use, at most `share` of the available bytes.

    A stated `cache_tokens` is taken as it is, where it fits. Raises SpecRTError RUN-011 where the memory is too small
    for it, or for one sequence; RUN-012 where `cache_tokens` is less than one block.
    """
    size, cost = layout.block_size, layout.block_bytes
    per_sequence = -(-max_sequence // size)
    wanted = max_batch * per_sequence
    if cache_tokens is not None:
        if cache_tokens < size:
            message = f"`cache_tokens` is {cache_tokens}, one block of the cache has {size} tokens"
            raise SpecRTError(
                "RUN-012", message, hint=f"give at least the longest sequence that you run, {max_sequence} here"
            )
        blocks = min(wanted, -(-cache_tokens // size))  # more than all sequences can fill is never touched
        if available is not None and blocks * cost > available:
            raise _too_small(f"{cache_tokens} tokens", blocks * cost, available, "lower `cache_tokens`")
        return CacheSize(blocks, size, cost, wanted, available)
    # a stage of a pipeline may have no layer with a cache
    blocks = wanted if available is None or not cost else min(wanted, int(available * share) // cost)
    if blocks < per_sequence:
        what = f"one sequence of {max_sequence} tokens"
        hint = (
            "free memory, compile with a lower `max_sequence`, or state a smaller `cache_tokens` "
            f"(the default takes {share:.0%} of the free memory)"
        )
        raise _too_small(what, per_sequence * cost, int((available or 0) * share), hint)
    return CacheSize(blocks, size, cost, wanted, available)


def _too_small(what: str, needed: int, available: int, hint: str) -> SpecRTError:
    message = f"the KV cache of {what} needs {needed / 1e6:.0f} MB, {available / 1e6:.0f} MB are available"
    return SpecRTError("RUN-011", message, hint=hint)


def available_memory() -> int | None:
    """Bytes that this process can still take: the system's, or the container's where that is less; None if unknown."""
    if not sys.platform.startswith("linux"):
        return None
    found = []
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if os.path.exists(limit) and os.path.exists(usage):
            text = Path(limit).read_text().strip()
            if text.isdigit():
                # the container's page cache counts as used but is given up on demand: it is not free, yet not lost
                found.append(max(0, int(text) - int(Path(usage).read_text()) + _page_cache(Path(usage).parent)))
    return min(found) if found else None


def _page_cache(group: Path) -> int:
    stat = group / "memory.stat"
    if not stat.exists():
        return 0
    values = dict(line.split()[:2] for line in stat.read_text().splitlines() if len(line.split()) >= 2)
    return int(values.get("inactive_file", 0))
