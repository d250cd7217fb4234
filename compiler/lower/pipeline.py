"""Cuts the steps of a plan into the stages of a pipeline, each on GPUs of its own.

What a stage holds, weights and cache, is what it must have room for and reads in a decode step: the fullest stage
decides what fits and how fast the others are fed. Of cuts about as good the one is taken where the fewest bytes cross.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from compiler.ir.types import DTYPES
from compiler.lower.plan import Plan, Step
from specs.errors import SpecRTError

SLACK = 0.02  # of the fullest stage: worth less than activations of twice the width that cross in every step
WEIGHT = "weight:"


def stages_of(plan: Plan, count: int) -> tuple[int, ...]:
    """The first step of each of `count` stages. Raises SpecRTError LOWER-041 where steps are fewer."""
    steps = len(plan.steps)
    if count == 1:
        return (0,)
    if steps < count:
        message = f"{count} stages of a pipeline are asked for, the plan has {steps} steps"
        raise SpecRTError("LOWER-041", message, hint=f"lower `pipeline` to {steps} or less")
    held, crossing = _held(plan), _crossing(plan)
    fullest, _ = _best(steps, count, lambda first, end, before: max(before, held[first][end]))
    limit = (1 + SLACK) * fullest
    return _best(steps, count, lambda first, end, before: _within(before + crossing[first], held[first][end], limit))[1]


def stage_text(plan: Plan) -> str:
    """What each stage holds, for people."""
    held = _held(plan, cache=False)
    ends = (*plan.stages[1:], len(plan.steps))
    each = []
    for number, (first, end) in enumerate(zip(plan.stages, ends, strict=True)):
        layers = sum("k_cache" in step.attrs for step in plan.steps[first:end])
        each.append(
            f"{number}: steps {first} to {end - 1}, weights of {held[first][end] / 1e6:,.1f} MB, {layers} attentions"
        )
    return "; ".join(each)


def _within(cost: float, size: float, limit: float) -> float:
    return cost if size <= limit else math.inf


def _best(steps: int, count: int, cost: Callable[[int, int, float], float]) -> tuple[float, tuple[int, ...]]:
    """The cheapest cut of so many steps, and what it costs: `cost` is of steps first to end behind what came before."""
    nothing: tuple[int, ...] = ()
    best = [(0.0, nothing)] + [(math.inf, nothing)] * steps
    for _ in range(count):
        best = [
            min(((cost(first, end, best[first][0]), (*best[first][1], first)) for first in range(end)),
                default=(math.inf, nothing))
            for end in range(steps + 1)
        ]  # fmt: skip
    return best[steps]


def _held(plan: Plan, cache: bool = True) -> list[list[float]]:
    """Bytes of weights and cache that steps first to end hold, by both; what two of them read is held once."""
    sizes = {f"{WEIGHT}{name}": weight.bytes for name, weight in plan.weights.items()}
    if cache and plan.cache is not None:
        places = next(sym.hi for sym in plan.dims if sym.name == "P") * plan.cache.block_size
        for layer in plan.cache.layers:
            wide = DTYPES[layer.dtype] // 8 * places * layer.heads
            sizes |= {layer.k: wide * layer.dim, layer.v: wide * layer.value_dim}
    each = [[name for name in _reads(step) if name in sizes] for step in plan.steps]
    found: list[list[float]] = []
    for first in range(len(each)):
        row, seen, total = [0.0] * (first + 1), set[str](), 0.0
        for names in each[first:]:
            total += sum(sizes[name] for name in names if name not in seen)
            seen.update(names)
            row.append(total)
        found.append(row)
    return found


def _reads(step: Step) -> set[str]:
    caches = (step.attrs.get(name) for name in ("k_cache", "v_cache"))
    return {*step.inputs.values(), *(str(name) for name in caches if name is not None)}


def _crossing(plan: Plan) -> list[float]:
    """Bytes of values that earlier steps make and later ones read, before each step, in a usual call."""
    usual = {sym.name: sym.opt for sym in plan.dims}
    sizes = {
        value.name: DTYPES[value.type.dtype] / 8
        * math.prod(dim if isinstance(dim, int) else usual[dim] for dim in value.type.shape)
        for value in plan.values
    }  # fmt: skip
    made = {name: index for index, step in enumerate(plan.steps) for name in step.outputs.values()}
    read = {name: index for index, step in enumerate(plan.steps) for name in step.inputs.values()}
    read |= {value.name: len(plan.steps) for _, value in plan.outputs}
    return [
        sum(sizes[name] for name, maker in made.items() if maker < cut <= read.get(name, -1))
        for cut in range(len(plan.steps))
    ]
