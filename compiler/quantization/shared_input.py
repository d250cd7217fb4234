"""What is stored of linears that share an input: ranges, smoothing, codes; each recipe's methods in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from compiler.passes.quantization_plan import Linear
from compiler.quantization.activations import rounded, static_parts
from compiler.quantization.rounding import Quantized, round_weight
from compiler.quantization.second_order import round_second_order
from compiler.quantization.smoothing import clipped, smoothing
from compiler.quantization.statistics import Inputs, gather
from specs.precision import Recipe

Weights = Callable[[str], Tensor]
UNSURE = 2.0  # times inputs over tokens: by how much of itself each second moment is raised; decision 60


def quantized(
    linears: Sequence[Linear], seen: Sequence[Tensor], exact: Sequence[Tensor], weights: Weights
) -> dict[str, Tensor]:
    """Everything that is stored of the linears that share an input: `seen`, and `exact` before anything is rounded."""
    found: dict[str, Tensor] = {}
    first = linears[0].weight
    drifts = any(compensates(linear) and not _meets_rounded(linear) for linear in linears)
    products = drifts or any(weighs_outputs(linear.recipe) for linear in linears)
    inputs = gather(seen, exact if drifts else (), products=products)
    smoothed = [linear for linear in linears if linear.recipe.smooth is not None]
    factors: Tensor | None = None
    if smoothed:
        loaded = [(weights(linear.weight).float(), linear.storage) for linear in smoothed]
        factors = smoothing(smoothed[0].recipe, inputs, loaded)
        # under the name of each: a target may have fewer rows for some (in the last layer); they then share no value
        names = dict.fromkeys([first, *(linear.weight for linear in smoothed)])
        found |= {f"{name}.smooth": factors.clone() for name in names}
    for alike in by_recipe(linears):
        recipe = alike[0].recipe
        own = factors if recipe.smooth is not None else None
        ranged = inputs if own is None else inputs.smoothed(own)
        static = static_parts(recipe, ranged)
        found |= {f"{linear.weight}.{suffix}": static[suffix].clone() for linear in alike for suffix in static}
        met = _met(recipe, seen, exact, own, static) if _meets_rounded(alike[0]) else ranged
        if compensates(alike[0]):
            met = met.raised(UNSURE * seen[0].shape[-1] / sum(x[..., 0].numel() for x in seen))
        for linear, made in zip(alike, round_alike(alike, weights, own, met), strict=True):
            found |= {f"{linear.weight}.{suffix}": tensor.contiguous() for suffix, tensor in made.parts().items()}
    return found


def _met(
    recipe: Recipe, seen: Sequence[Tensor], exact: Sequence[Tensor], factors: Tensor | None, parts: Mapping[str, Tensor]
) -> Inputs:
    """What the weights of a recipe with rounded inputs meet, for rounding that makes up for errors."""
    factor = 1.0 if factors is None else factors
    return gather(
        (rounded(recipe, (x * factor).reshape(-1, x.shape[-1]).float(), parts) for x in seen),
        (x * factor for x in exact),
    )


def round_alike(
    alike: Sequence[Linear], weights: Weights, factors: Tensor | None, inputs: Inputs
) -> Iterator[Quantized]:
    """The weights of linears of one recipe, rounded as it says."""
    how, smooth = alike[0].recipe.weights, alike[0].recipe.smooth
    assert how is not None
    loaded = ((weights(linear.weight).float(), linear.storage) for linear in alike)
    moved = ((weight if factors is None else weight / factors, storage) for weight, storage in loaded)
    if compensates(alike[0]):
        yield from round_second_order(list(moved), inputs)
        return
    for weight, storage in moved:
        if smooth is not None and smooth.clip:
            yield clipped(weight, storage, inputs).codes(weight, storage)
        else:
            yield round_weight(weight, storage, how.range)


def by_recipe(linears: Iterable[Linear]) -> list[list[Linear]]:
    """Linears of one recipe together, in the order of the first of each."""
    found: dict[str, list[Linear]] = {}
    for linear in linears:
        found.setdefault(linear.recipe.name, []).append(linear)
    return list(found.values())


def weighs_outputs(recipe: Recipe) -> bool:
    """Whether a method weighs errors of weights by the outputs' error, for which it needs second moments."""
    return recipe.smooth is not None and (recipe.smooth.method == "awq" or recipe.smooth.clip)


def _meets_rounded(linear: Linear) -> bool:
    """Whether rounding makes up for errors, and that against inputs which are rounded themselves."""
    return compensates(linear) and linear.recipe.activations is not None


def compensates(linear: Linear) -> bool:
    """Whether rounding makes up for errors, so that it aims at what the model was before."""
    return linear.recipe.weights is not None and linear.recipe.weights.rounding == "gptq"
