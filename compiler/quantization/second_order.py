"""Rounding column by column, each error made up for by the columns that follow (arXiv:2210.17323).

Then each code in turn is set anew where the others leave the least error, some passes over all of them.

Columns go by falling second moment of their inputs; the scale of each group is fixed before (static groups), so that
the stored layout is that of plain groups and nothing has to be permuted at run time. What follows from the inputs is
made once for all weights that share them, whose rows go together; while the loop runs a column lies in one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.ir.formats import RANGE, round_to, spread
from compiler.passes.quantization_plan import Storage
from compiler.quantization.rounding import Quantized, Scales, reduced, search_range
from compiler.quantization.statistics import Inputs
from specs.errors import SpecRTError

DAMP = 0.01  # of the mean second moment, added to each; section 3.3, step 3
SHARE = 0.5  # of the way to what undoes earlier rounding; found on tokens apart from those of docs/precision.md
BLOCK = 128  # columns whose updates are collected; step 2
PASSES = 4  # over all columns afterwards: one takes 3 % of the held-out outputs' error, four 4 %, more 0.2 %
ROWS = 2048  # that go together: 128 columns of them are 1 MB


def round_second_order(weights: Sequence[tuple[Tensor, Storage]], inputs: Inputs) -> list[Quantized]:
    """Codes of weights [out, in] of one type that share an input; raises SpecRTError PREC-014."""
    shared = _Shared.of(inputs)
    targets = [shared.target(weight) for weight, _ in weights]
    scales = [_ranges(target, storage) for target, (_, storage) in zip(targets, weights, strict=True)]
    grids = [_Grid.of(found, storage) for found, (_, storage) in zip(scales, weights, strict=True)]
    rows, grid = torch.cat(targets), _Grid.joined(grids)
    codes = torch.cat(
        [shared.codes(rows[at : at + ROWS], grid.rows(at, at + ROWS)) for at in range(0, len(rows), ROWS)]
    )
    pieces = torch.split(codes, [len(target) for target in targets])
    return [
        Quantized(piece, found.scale, found.zero, found.outer, storage.block)
        for piece, found, (_, storage) in zip(pieces, scales, weights, strict=True)
    ]


def _ranges(weight: Tensor, storage: Storage) -> Scales:
    return search_range(weight, storage, lambda error: reduced(error.square(), storage, "sum"))


@dataclass(frozen=True)
class _Grid:
    """The numbers (code - zero) * step that each weight [out, in] may become."""

    type: str
    step: Tensor
    zero: Tensor | None

    @staticmethod
    def of(scales: Scales, storage: Storage) -> _Grid:
        def each(part: Tensor) -> Tensor:
            wide: Tensor = spread(part.float(), storage.shape, storage.block)
            return wide.expand(storage.shape)

        step = each(scales.scale)
        step = step if scales.outer is None else step * scales.outer
        return _Grid(storage.type, step, None if scales.zero is None else each(scales.zero))

    @staticmethod
    def joined(grids: Sequence[_Grid]) -> _Grid:
        """That of several weights whose rows follow each other."""
        zeros = [grid.zero for grid in grids if grid.zero is not None]
        return _Grid(grids[0].type, torch.cat([grid.step for grid in grids]), torch.cat(zeros) if zeros else None)

    def rows(self, start: int, stop: int) -> _Grid:
        """That of some rows."""
        return _Grid(self.type, self.step[start:stop], None if self.zero is None else self.zero[start:stop])

    def columns(self, order: Tensor) -> _Grid:
        """With columns first, in an order."""
        return _Grid(self.type, self.step.T[order], None if self.zero is None else self.zero.T[order])

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """The codes nearest to the values [out] of a column."""
        exact = values / self.step[column]
        if self.zero is not None:
            exact += self.zero[column]
        if self.type.startswith("f"):
            return round_to(exact, self.type).float()
        return exact.round_().clamp_(*RANGE[self.type])

    def values(self, codes: Tensor, column: int) -> Tensor:
        """What the codes [out] of a column stand for."""
        return (codes if self.zero is None else codes - self.zero[column]) * self.step[column]


@dataclass(frozen=True)
class _Shared:
    """What inputs give: moments in the order of columns, the upper factor of their inverse, and the drift."""

    order: Tensor
    moment: Tensor
    inverse: Tensor
    drift: Tensor | None

    @staticmethod
    def of(inputs: Inputs) -> _Shared:
        moment = inputs.products
        order = torch.argsort(moment.diagonal(), descending=True)
        damped = moment[order][:, order].double()
        mean = damped.diagonal().mean().clamp_min(1e-12)  # an input that is always zero counts as one
        damped.diagonal().add_(mean * DAMP)
        drift = None if inputs.drift is None else inputs.drift[:, order]
        return _Shared(order, damped.float(), _inverse_factor(damped), drift)

    def target(self, weight: Tensor) -> Tensor:
        """The weight with the least error of the outputs that the model had before anything was rounded.

        W x0 is approached by V x with V = W (x0'x) (x'x)^-1 = W + W drift (x'x)^-1: what rounding further up did to x
        is made up for here, as far as this product can.
        """
        if self.drift is None:
            return weight
        moved = weight @ self.drift @ self.inverse.T @ self.inverse
        return weight + SHARE * moved[:, torch.argsort(self.order)]

    def codes(self, weight: Tensor, grid: _Grid) -> Tensor:
        """The codes of some rows."""
        ordered, grid = weight.T[self.order], grid.columns(self.order)
        found = _descended(ordered, grid, _in_turn(ordered, grid, self.inverse), self.moment)
        return round_to(found[torch.argsort(self.order)].T.contiguous(), grid.type)


def _in_turn(weight: Tensor, grid: _Grid, inverse: Tensor) -> Tensor:
    """Codes [in, out] of each column after the errors of those before it have been spread over the rest."""
    rest, codes = weight.clone(), torch.empty_like(weight)
    own = inverse.diagonal().tolist()
    for start in range(0, len(weight), BLOCK):
        stop = min(start + BLOCK, len(weight))
        errors = torch.empty(stop - start, weight.shape[-1])
        for column, error in enumerate(errors, start=start):
            codes[column] = grid.nearest(rest[column], column)
            torch.sub(rest[column], grid.values(codes[column], column), out=error).div_(own[column])
            rest[column + 1 : stop].addr_(inverse[column, column + 1 : stop], error, alpha=-1)
        rest[stop:].addmm_(inverse[start:stop, stop:].T, errors, alpha=-1)
    return codes


def _descended(weight: Tensor, grid: _Grid, codes: Tensor, moment: Tensor) -> Tensor:
    """Codes of less or the same error tr(D' M D), D what they differ by from the weight: one column after the other."""
    offset = codes if grid.zero is None else codes - grid.zero
    slope = moment @ (offset * grid.step - weight)
    curve = moment.diagonal().tolist()
    for _ in range(PASSES):
        for start in range(0, len(weight), BLOCK):
            stop = min(start + BLOCK, len(weight))
            near, moved = slope[start:stop].clone(), torch.empty(stop - start, weight.shape[-1])
            for column, (here, move) in enumerate(zip(near, moved, strict=True), start=start):
                old = grid.values(codes[column], column)
                codes[column] = grid.nearest(torch.sub(old, here, alpha=1 / curve[column]), column)
                torch.sub(grid.values(codes[column], column), old, out=move)
                near.addr_(moment[column, start:stop], move)
            slope.addmm_(moment[:, start:stop], moved)
    return codes


def _inverse_factor(damped: Tensor) -> Tensor:
    """The upper factor U of the inverse U'U, by way of the moments' own factor from the last column to the first."""
    factor, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(failed):
        raise SpecRTError("PREC-014", "calibration gave inputs that are not finite", hint="give other calibration data")
    inverse: Tensor = torch.linalg.solve_triangular(factor.float(), torch.eye(len(factor)), upper=False).flip(0, 1)
    return inverse
