"""What calibration keeps of the inputs of a linear: second moments, magnitudes, and some rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

ROWS = 512  # kept to try rounding on


@dataclass(frozen=True)
class Inputs:
    """Of all inputs x [N,K]: `moment` = x'x / N, largest and mean |x| of each, and `rows` spread over all of them.

    `drift` = (x0 - x)'x / N, where x0 are the inputs that the model has before anything is rounded.
    """

    moment: Tensor
    largest: Tensor
    mean: Tensor
    rows: Tensor
    drift: Tensor | None = None

    def smoothed(self, factors: Tensor) -> Inputs:
        """Of x * factors."""
        size = factors.abs()
        moment = self.moment * factors * factors[:, None]
        drift = None if self.drift is None else self.drift * factors * factors[:, None]
        return Inputs(moment, self.largest * size, self.mean * size, self.rows * factors, drift)


def gather(tensors: Iterable[Tensor], exact: Iterable[Tensor] = ()) -> Inputs:
    """The statistics of inputs that come batch by batch, [..., K] each; `exact` are the same before rounding."""
    drift = moment = largest = total = None
    kept: list[Tensor] = []
    count = 0
    for tensor, wanted in zip_longest(tensors, exact):
        x = tensor.reshape(-1, tensor.shape[-1]).float()
        if wanted is not None:
            apart = (wanted.reshape(x.shape).float() - x).T @ x
            drift = apart if drift is None else drift + apart
        size = x.abs()
        moment = x.T @ x if moment is None else moment + x.T @ x
        largest = size.amax(0) if largest is None else torch.maximum(largest, size.amax(0))
        total = size.sum(0) if total is None else total + size.sum(0)
        kept.append(x[:: max(len(x) // ROWS, 1)])
        count += len(x)
    assert moment is not None
    assert largest is not None
    assert total is not None
    rows = torch.cat(kept)
    kept_rows = rows[:: -(-len(rows) // ROWS)].clone()
    return Inputs(moment / count, largest, total / count, kept_rows, None if drift is None else drift / count)
