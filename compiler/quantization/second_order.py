"""Rounding column by column, each error made up for by the columns that follow (arXiv:2210.17323).

Columns go by falling second moment of their inputs; the scale of each group is fixed before (static groups), so that
the stored layout is that of plain groups and nothing has to be permuted at run time.
"""

from __future__ import annotations

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
    return _compensated(weight.clone(), storage, scales, inputs.moment)


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
    from dataclasses import replace

    return replace(storage, shape=storage.shape[1:], scale_shape=storage.scale_shape[1:])


def _compensated(weight: Tensor, storage: Storage, scales: Scales, moment: Tensor) -> Quantized:
    width = weight.shape[-1]
    step = spread(scales.scale.float(), weight.shape, storage.block).expand(weight.shape)
    zero = torch.zeros(()) if scales.zero is None else spread(scales.zero.float(), weight.shape, storage.block)
    zero = zero.expand(weight.shape)
    order = torch.argsort(moment.diagonal(), descending=True)
    back = torch.argsort(order)
    weight, step, zero = weight[:, order], step[:, order], zero[:, order]
    inverse = _inverse_factor(moment[order][:, order])
    codes = torch.zeros_like(weight)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        errors = torch.zeros(weight.shape[0], stop - start)
        for column in range(start, stop):
            w, s, z = weight[:, column], step[:, column], zero[:, column]
            exact = w / s if scales.zero is None else (w / s).round() + z
            codes[:, column] = round_to(exact, storage.type).float()
            error = (w - (codes[:, column] - z) * s) / inverse[column, column]
            weight[:, column:stop] -= error[:, None] * inverse[column, column:stop]
            errors[:, column - start] = error
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    held = round_to(codes[:, back], storage.type)
    return Quantized(held, scales.scale, scales.zero, scales.outer, storage.block)


def _inverse_factor(moment: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moments; an input that is always zero counts as one."""
    damped = _damped(moment)
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
