"""Rounding column by column, each error made up for by the columns that follow (arXiv:2210.17323).

Then each code in turn is set anew where the others leave the least error, some passes over all of them.

Columns go by falling second moment of their inputs; the scale of each group is fixed before (static groups), so that
the stored layout is that of plain groups and nothing has to be permuted at run time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compiler.ir.formats import round_to, spread
from compiler.passes.quantization_plan import Storage
from compiler.quantization.rounding import Quantized, Scales, reduced, search_range
from compiler.quantization.statistics import Inputs
from specs.errors import SpecRTError

DAMP = 0.01  # of the mean second moment, added to each; section 3.3, step 3
SHARE = 0.5  # of the way to what undoes earlier rounding; found on tokens apart from those of docs/precision.md
BLOCK = 128  # columns whose updates are collected; step 2
PASSES = 4  # over all columns afterwards: one takes 3 % of the held-out outputs' error, four 4 %, more 0.2 %


def round_second_order(weight: Tensor, storage: Storage, inputs: Inputs) -> Quantized:
    """Codes of a weight [out, in] or of each of several [..., out, in]; raises SpecRTError PREC-014."""
    if weight.ndim > 2:
        parts = [round_second_order(one, _of_one(storage), inputs) for one in weight]
        stacked = [
            None if any(item is None for item in column) else torch.stack([item for item in column if item is not None])
            for column in zip(*((part.codes, part.scale, part.zero) for part in parts), strict=True)
        ]
        codes, scale, zero = stacked
        assert codes is not None
        assert scale is not None
        return Quantized(codes, scale, zero, None, storage.block)
    weight = _target(weight, inputs)
    scales = search_range(weight, storage, lambda error: reduced(error.square(), storage, "sum"))
    return _compensated(weight, storage, scales, inputs.moment)


def _target(weight: Tensor, inputs: Inputs) -> Tensor:
    """The weight with the least error of the outputs that the model had before anything was rounded.

    W x0 is approached by V x with V = W (x0'x) (x'x)^-1 = W + W drift (x'x)^-1: what rounding further up did to x is
    made up for here, as far as this product can.
    """
    if inputs.drift is None:
        return weight
    moment, drift = _damped(inputs.moment), inputs.drift.double()
    moved: Tensor = weight.double() @ torch.linalg.solve_ex(moment, drift, left=False)[0]  # not finite: PREC-014 below
    return weight + SHARE * moved.float()


def _of_one(storage: Storage) -> Storage:
    return replace(storage, shape=storage.shape[1:], scale_shape=storage.scale_shape[1:])


def _compensated(weight: Tensor, storage: Storage, scales: Scales, moment: Tensor) -> Quantized:
    step = spread(scales.scale.float(), weight.shape, storage.block).expand(weight.shape)
    if scales.outer is not None:
        step = step * scales.outer
    zero = torch.zeros(()) if scales.zero is None else spread(scales.zero.float(), weight.shape, storage.block)
    zero = zero.expand(weight.shape)
    order = torch.argsort(moment.diagonal(), descending=True)
    grid = _Grid(storage.type, step[:, order], zero[:, order])
    ordered, met = weight[:, order], _damped(moment[order][:, order])
    codes = _descended(ordered, grid, _in_turn(ordered, grid, _inverse_factor(met)), met.float())
    held = round_to(codes[:, torch.argsort(order)], storage.type)
    return Quantized(held, scales.scale, scales.zero, scales.outer, storage.block)


@dataclass(frozen=True)
class _Grid:
    """The numbers (code - zero) * step that each weight [out, in] may become."""

    type: str
    step: Tensor
    zero: Tensor

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """The codes nearest to the values [out] of a column."""
        return round_to(values / self.step[:, column] + self.zero[:, column], self.type).float()

    def values(self, codes: Tensor, column: int) -> Tensor:
        """What the codes [out] of a column stand for."""
        return (codes - self.zero[:, column]) * self.step[:, column]


def _in_turn(weight: Tensor, grid: _Grid, inverse: Tensor) -> Tensor:
    """Codes of each column after the errors of those before it have been spread over the rest."""
    weight, codes = weight.clone(), torch.zeros_like(weight)
    for start in range(0, weight.shape[-1], BLOCK):
        stop = min(start + BLOCK, weight.shape[-1])
        errors = torch.zeros(weight.shape[0], stop - start)
        for column in range(start, stop):
            w = weight[:, column]
            codes[:, column] = grid.nearest(w, column)
            error = (w - grid.values(codes[:, column], column)) / inverse[column, column]
            weight[:, column:stop] -= error[:, None] * inverse[column, column:stop]
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    return codes


def _descended(weight: Tensor, grid: _Grid, codes: Tensor, moment: Tensor) -> Tensor:
    """Codes of less or the same error tr(D M D'), D what they differ by from the weight: one column after the other."""
    slope = ((codes - grid.zero) * grid.step - weight) @ moment
    curve = moment.diagonal()
    for _ in range(PASSES):
        for start in range(0, weight.shape[-1], BLOCK):
            stop = min(start + BLOCK, weight.shape[-1])
            near, moved = slope[:, start:stop].clone(), torch.zeros(weight.shape[0], stop - start)
            for column in range(start, stop):
                old = grid.values(codes[:, column], column)
                codes[:, column] = grid.nearest(old - near[:, column - start] / curve[column], column)
                moved[:, column - start] = grid.values(codes[:, column], column) - old
                near += moved[:, column - start, None] * moment[column, start:stop]
            slope += moved @ moment[start:stop]
    return codes


def _inverse_factor(damped: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moments; an input that is always zero counts as one."""
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise SpecRTError("PREC-014", "calibration gave inputs that are not finite", hint="give other calibration data")
    inverse = torch.cholesky_inverse(factor)
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.float()


def _damped(moment: Tensor) -> Tensor:
    moment = moment.double()
    mean = moment.diagonal().mean().clamp_min(1e-12)
    return moment + torch.diag(torch.full((len(moment),), float(mean * DAMP), dtype=torch.float64))
