"""What calibration keeps of the inputs of a linear: second moments, magnitudes, and some rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

ROWS = 512  # kept to try rounding on
WIDE = 256  # columns of a block of second moments


@dataclass(frozen=True)
class Inputs:
    """Of all inputs x [N,K]: `moment` = x'x / N, largest and mean |x| of each, and `rows` spread over all of them.

    `moment` is left out where nothing asks for it. `drift` = (x0 - x)'x / N, where x0 are the inputs that the model
    has before anything is rounded.
    """

    moment: Tensor | None
    largest: Tensor
    mean: Tensor
    rows: Tensor
    drift: Tensor | None = None

    @property
    def products(self) -> Tensor:
        """The moment, of inputs that were gathered with it."""
        assert self.moment is not None
        return self.moment

    def smoothed(self, factors: Tensor) -> Inputs:
        """Of x * factors."""
        size = factors.abs()

        def both(products: Tensor | None) -> Tensor | None:
            return None if products is None else products * factors * factors[:, None]

        return Inputs(both(self.moment), self.largest * size, self.mean * size, self.rows * factors, both(self.drift))

    def raised(self, share: float) -> Inputs:
        """With each input's second moment larger by a share of itself: what inputs have in common then counts less."""
        return replace(self, moment=self.products + torch.diag(self.products.diagonal() * share))


def gather(tensors: Iterable[Tensor], exact: Iterable[Tensor] = (), products: bool = True) -> Inputs:
    """The statistics of inputs that come batch by batch, [..., K] each; `exact` are the same before rounding.

    `products`: with the moment, which costs as much as a linear with K outputs.
    """
    drift = moment = largest = total = None
    kept: list[Tensor] = []
    count = 0
    for tensor, wanted in zip_longest(tensors, exact):
        x = tensor.reshape(-1, tensor.shape[-1]).float()
        if largest is None or total is None:
            width = x.shape[-1]
            largest, total = torch.zeros(width), torch.zeros(width)
            moment = torch.zeros(width, width) if products else None
            drift = None if wanted is None else torch.zeros(width, width)
        if drift is not None:
            drift.addmm_((wanted.reshape(x.shape).float() - x).T, x)
        if moment is not None:
            _add_products(moment, x)
        size = x.abs()
        largest = torch.maximum(largest, size.amax(0))
        total += size.sum(0)
        kept.append(x[:: max(len(x) // ROWS, 1)])
        count += len(x)
    assert largest is not None
    assert total is not None
    rows = torch.cat(kept)
    kept_rows = rows[:: -(-len(rows) // ROWS)].clone()
    moment = None if moment is None else (moment.triu() + moment.triu(1).T) / count
    return Inputs(moment, largest, total / count, kept_rows, None if drift is None else drift / count)


def _add_products(moment: Tensor, x: Tensor) -> None:
    """moment += x'x on and above the diagonal, and no more below it than whole blocks bring."""
    for start in range(0, x.shape[-1], WIDE):
        stop = start + WIDE
        moment[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
