"""Memory bandwidth: reading one array, and STREAM's triad, over arrays far larger than any cache."""

from __future__ import annotations

import torch

from worker import seconds, serve

COUNT = 128 * 1024 * 1024  # float32 values: 512 MB an array


class Engine:
    """Three arrays; a call measures once."""

    def load(self, threads: int, **_: object) -> dict[str, object]:
        """Allocate and touch the arrays."""
        torch.set_num_threads(threads)
        self.a, self.b, self.c = torch.ones(COUNT), torch.ones(COUNT), torch.ones(COUNT)
        return {}

    def bandwidth(self) -> dict[str, float]:
        """GB/s of a sum (read only) and of a = b + 3 c (two reads and a write); the best of three."""
        size = 4 * COUNT / 1e9
        read = size / min(seconds(lambda: self.a.sum()) for _ in range(3))
        triad = 3 * size / min(seconds(lambda: torch.add(self.b, self.c, alpha=3, out=self.a)) for _ in range(3))
        return {"read": read, "triad": triad}


if __name__ == "__main__":
    serve(Engine())
