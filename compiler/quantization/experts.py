"""Matrices of experts under calibration: each is rounded for the tokens that chose it, one at a time.

Of few tokens second moments tell what these share and not what the next will: compensation by them makes errors up to
1.8 times as large as rounding to nearest. So an expert with fewer than two tokens for each input gets its moments drawn
towards their diagonal, as far as they are noise (doi:10.2202/1544-6115.1175, section 2.4), and one with an eighth of
a token or less is rounded to nearest in ranges of least square error: it is in `QuantizationPlan.seldom`. What rounding
further up did to inputs is not made up for: other tokens come then, and at 1 to 16 tokens an input it never helped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compiler.ir.ops import REGISTRY
from compiler.passes.quantization_plan import Linear
from compiler.quantization.rounding import Quantized, round_weight
from compiler.quantization.shared_input import Weights, by_recipe, compensates, round_alike, weighs_outputs
from compiler.quantization.statistics import Inputs, gather

FEW, ENOUGH = 1 / 8, 2  # tokens for each input: less is none, and from here on moments are taken as they are


@dataclass(frozen=True)
class Routed:
    """The input [*N,J,M] of a product with experts, and the expert of each place, [*N,K]; J is K or 1."""

    x: Tensor
    chosen: Tensor

    def rows(self, expert: int) -> Tensor:
        """What an expert gets, [tokens, M]."""
        return self.x.expand(*self.chosen.shape, self.x.shape[-1])[self.chosen == expert]


def product(routed: Sequence[Routed], matrix: Callable[[int], Tensor], experts: int, out: int) -> list[Tensor]:
    """`gather_matmul` of all batches, with `matrix` asked for one expert after the other."""
    results = [one.x.new_zeros(*one.chosen.shape, out) for one in routed]
    for expert in range(experts):
        if not any(bool((one.chosen == expert).any()) for one in routed):
            continue
        weight = matrix(expert)
        for one, result in zip(routed, results, strict=True):
            result[one.chosen == expert] = REGISTRY["matmul"].body(one.rows(expert), weight, transpose_b=True)
    return results


def quantized_experts(linears: Sequence[Linear], seen: Sequence[Routed], weights: Weights) -> dict[str, Tensor]:
    """Everything that is stored of matrices of experts that share an input; `tokens`: how many each expert got."""
    found: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    fitted = [linear for linear in linears if fits(linear)]
    for linear in linears:
        if linear not in fitted:
            how = linear.recipe.weights
            assert how is not None
            made = round_weight(weights(linear.weight), linear.storage, how.range)
            found |= {f"{linear.weight}.{suffix}": tensor for suffix, tensor in made.parts().items()}
    held = {linear.weight: weights(linear.weight) for linear in fitted}
    for expert in range(linears[0].storage.shape[0]) if fitted else ():
        tokens, inputs = _inputs(seen, expert)
        for linear, made in _of_expert(fitted, {name: matrices[expert] for name, matrices in held.items()}, inputs):
            for suffix, tensor in {**made.parts(), "tokens": torch.tensor(tokens)}.items():
                parts.setdefault(f"{linear.weight}.{suffix}", []).append(tensor)
    return found | {name: torch.stack(tensors) for name, tensors in parts.items()}


def _of_expert(
    linears: Sequence[Linear], matrices: Mapping[str, Tensor], inputs: Inputs | None
) -> Iterator[tuple[Linear, Quantized]]:
    """One expert's matrices, by what it gets; None: to nearest."""
    for alike in by_recipe(replace(linear, storage=linear.storage.of_one()) for linear in linears):
        if inputs is None:
            made = [round_weight(matrices[linear.weight], linear.storage, "mse") for linear in alike]
        else:
            made = list(round_alike(alike, matrices.__getitem__, None, inputs))
        yield from zip(alike, made, strict=True)


def fits(linear: Linear) -> bool:
    """Whether the codes of experts follow from their tokens; of the others rounding to nearest is the method."""
    return compensates(linear) or weighs_outputs(linear.recipe)


def seldom(linear: Linear, tokens: Tensor) -> tuple[int, ...]:
    """The experts that were rounded to nearest, of how many tokens each got."""
    return tuple(expert for expert, count in enumerate(tokens.tolist()) if count < FEW * linear.storage.shape[-1])


def _inputs(seen: Sequence[Routed], expert: int) -> tuple[int, Inputs | None]:
    """How many tokens an expert gets and their statistics, if these are enough for any."""
    rows = torch.cat([one.rows(expert) for one in seen]).float()
    if len(rows) < FEW * rows.shape[-1]:
        return len(rows), None
    found = gather([rows])
    return len(rows), found if len(rows) >= ENOUGH * rows.shape[-1] else shrunk(found, rows)


def shrunk(inputs: Inputs, rows: Tensor) -> Inputs:
    """With second moments of rows [N,M] drawn towards their diagonal by the share of them that is noise.

    Of the correlations r this is sum var(r) / sum r^2 off the diagonal.
    """
    moment, count = inputs.products, len(rows)
    size = moment.diagonal().clamp_min(1e-30).rsqrt()
    squares, correlation = (rows * size).square(), moment * size * size[:, None]
    apart = float(correlation.square().sum() - correlation.diagonal().square().sum())
    noise = float((squares.sum(-1).square() - squares.square().sum(-1)).mean()) - apart
    share = min(max(noise / (count * apart), 0.0), 1.0) if apart > 0 else 1.0
    return replace(inputs, moment=moment * (1 - share) + torch.diag(moment.diagonal() * share))
