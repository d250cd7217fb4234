"""The reference's outputs of a model, in float32, from the plain equations of its spec and without a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compiler.validate.metrics import Floats

if TYPE_CHECKING:
    import torch

    from compiler.ir.core import Graph


def outputs(
    graph: Graph,
    weights: Callable[[str], torch.Tensor],
    rows: Sequence[Sequence[int]],
    further: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, Floats]]:
    """The outputs of a graph over tokens [B,S], row by row without the batch dim; `further` are inputs of each row."""
    import torch

    from compiler.ir.interpreter import run

    kept: dict[str, torch.Tensor] = {}

    def weight(name: str) -> torch.Tensor:
        if name not in kept:
            kept[name] = weights(name).float()
        return kept[name]

    found = []
    for index, row in enumerate(rows):
        zeros = [0] * len(row)
        given: dict[str, Any] = {"tokens": row, "positions": range(len(row)), "rows": zeros, "token_types": zeros}
        given |= dict(further[index]) if further is not None else {}
        inputs = {value.name: torch.tensor([given[value.name]], dtype=torch.int32) for value in graph.inputs}
        found.append({name: value[0].numpy() for name, value in run(graph, inputs, weight).items()})
    return found


def main_output(names: Sequence[str]) -> str:
    """The output by which a model is judged: its logits, else its hidden states, else the first."""
    return next((name for name in ("logits", "last_hidden_state") if name in names), names[0])


def random_rows(vocab: int, lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Rows of random ids, equal for equal seeds."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab, length).tolist() for length in lengths]
