"""Gives weights by our names: from a checkpoint through its weight map, or random for benchmarks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from specs.weight_map import WeightDecl, WeightSource

Weights = Callable[[str], "torch.Tensor"]


def checkpoint_weights(sources: Mapping[str, WeightSource]) -> Weights:
    """Weights read from the files that hold them, each on demand, in the file's type."""
    return lambda name: sources[name].read()


def random_weights(declared: Sequence[WeightDecl], seed: int = 0) -> Weights:
    """Weights of the declared shapes with no meaning, equal for equal seeds.

    Matrices have deviation 1 / sqrt(width of the input), so that values keep their size through a model of any width
    (LeCun et al., Efficient BackProp, 1998, section 4.6), gains of norms 1 +- 0.1, other vectors 0.1.
    """
    import torch

    shapes = {decl.name: decl.shape for decl in declared}

    def make(name: str) -> torch.Tensor:
        shape = shapes[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        noise = torch.randn(shape, generator=generator)
        scale, shift = (shape[-1] ** -0.5, 0.0) if len(shape) > 1 else (0.1, float(name.endswith(".weight")))
        return noise * scale + shift

    return make
