"""Device memory, counted before any is taken: what is needed, what is there, and what to lower."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.cache import CacheSize, decide_size
from runtime.program import CacheLayout
from specs.errors import SpecRTError

SHARE = 0.92  # of what is free after everything else that the cache may take: TensorRT and the driver need some room


@dataclass(frozen=True)
class Needs:
    """Bytes on the device beside the cache."""

    weights: int
    arena: int
    engines: int
    batch: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.arena + self.engines + self.batch

    def __str__(self) -> str:
        parts = (("weights", self.weights), ("values", self.arena), ("engines", self.engines), ("batch", self.batch))
        return ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in parts)


def plan_memory(
    needs: Needs,
    layout: CacheLayout | None,
    free: int,
    *,
    max_batch: int,
    max_sequence: int,
    cache_tokens: int | None,
    tokens: int,
) -> CacheSize | None:
    """The size of the cache beside everything else, before anything is allocated; None where the model has none.

    Raises SpecRTError RUN-040 where the GPU is too small without a cache, RUN-011 and RUN-012 as on the CPU.
    """
    if needs.total > free:
        message = f"the model needs {needs.total / 1e6:,.0f} MB on the GPU, {free / 1e6:,.0f} MB are free"
        largest = max((needs.weights, "weights"), (needs.arena + needs.engines, "values"))[1]
        lower = {
            "weights": "compile with a precision of fewer bytes, or use a larger GPU",
            "values": f"load with a lower `step_tokens` (now {tokens})",
        }[largest]
        raise SpecRTError("RUN-040", message, hint=f"{lower}; in all: {needs}")
    if layout is None:
        return None
    return decide_size(
        layout, max_batch=max_batch, max_sequence=max_sequence, cache_tokens=cache_tokens,
        available=free - needs.total, share=SHARE,
    )  # fmt: skip
