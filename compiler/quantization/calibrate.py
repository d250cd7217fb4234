"""Calibration: runs the float graph over all windows at once, equation by equation, and quantizes each linear it meets.

Any graph will do, no model code is needed: the inputs of a product are at hand when it is reached. All products that
share an input are quantized together, and what follows sees their outputs with the rounded weights. One layer's weights
are in memory at a time; results go to a folder, one file for each input, which an interrupted run takes up again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compiler.ir.core import Equation, Graph, Value, used_values
from compiler.ir.interpreter import Runner
from compiler.ir.names import expand
from compiler.ir.ops import REGISTRY
from compiler.passes.quantization_plan import Linear, QuantizationPlan
from compiler.quantization.activations import rounded, static_parts
from compiler.quantization.rounding import Quantized, round_weight
from compiler.quantization.second_order import round_second_order
from compiler.quantization.smoothing import clipped, smoothing
from compiler.quantization.statistics import Inputs, gather
from runtime.derive import Rules
from specs.errors import SpecRTError
from specs.precision import Recipe

Weights = Callable[[str], Tensor]
Progress = Callable[[str, int, int], None]
Scope = dict[str, Tensor]
BATCH = 4  # windows that run together
PARTS = ("codes", "scale", "zero", "outer", "smooth", "input_scale", "input_outer")


def calibrate(
    graph: Graph,
    plan: QuantizationPlan,
    weights: Weights,
    windows: NDArray[np.int64],
    folder: Path,
    progress: Progress | None = None,
    rules: Rules | None = None,
) -> Weights:
    """Every calibrated tensor by name: codes, scales, zeros, smoothing factors and static scales.

    `graph` is the float graph over tokens [B,S]; `folder` is filled, or read where an earlier run filled it;
    `rules` say how further inputs follow from a window's tokens.
    Raises SpecRTError PREC-013 where the graph has an input that does not follow from tokens, RUN-017 where a window
    lacks a token that a rule looks for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lockstep = _Lockstep(graph, plan, weights, folder, progress, rules or {})
    with torch.no_grad():
        lockstep.run(windows)
    return _reader(folder)


def _reader(folder: Path) -> Weights:
    places: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places.update(dict.fromkeys(file.keys(), path))

    def read(name: str) -> Tensor:
        with safe_open(places[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    return read


class _Lockstep:
    def __init__(
        self,
        graph: Graph,
        plan: QuantizationPlan,
        weights: Weights,
        folder: Path,
        progress: Progress | None,
        rules: Rules,
    ) -> None:
        self.rules = rules
        self.graph, self.plan, self.weights, self.folder, self.progress = graph, plan, weights, folder, progress
        self.effective: dict[str, _Product] = {}  # products still to come, as they will be computed
        self.runners: list[Runner] = []
        self.rounded = 0  # scopes that see rounded weights; behind them, where a recipe wants it, those that do not
        self.done = 0

    def run(self, windows: NDArray[np.int64]) -> None:
        scopes: list[Scope] = []
        for start in range(0, len(windows), BATCH):
            runner = Runner(self.weights, {}, None)
            self.runners.append(runner)
            scopes.append(_inputs(self.graph, runner, windows[start : start + BATCH], self.rules))
        self.rounded = len(scopes)
        if any(_compensates(linear) for linear in self.plan.linears.values()):
            self.runners += self.runners
            scopes += [dict(scope) for scope in scopes]
        self.block(self.graph.equations, scopes, None, ())

    def block(
        self, equations: Sequence[Equation], scopes: list[Scope], index: int | None, results: Sequence[Value]
    ) -> None:
        """Equations in order, each for every batch; values go when nothing reads them any more."""
        last = {value.name: place for place, equation in enumerate(equations) for value in used_values(equation)}
        last.update((value.name, len(equations)) for value in results)
        templates = {eq.result.name: str(eq.attr["name"]) for eq in equations if eq.op == "weight"}
        own = {value.name for equation in equations for value in equation.results}
        for place, equation in enumerate(equations):
            full = self.planned(equation, templates, index)
            if equation.op == "repeat":
                self.repeat(equation, scopes)
            elif full is not None:
                if full not in self.effective:
                    self.quantize(equations[place:], equation, templates, scopes, index)
                self.product(equation, full, scopes)
            elif not self.is_planned_weight(equation, index):
                self.step(equation, scopes, index)
            for name in own:
                if last.get(name, -1) == place:
                    for scope in scopes:
                        scope.pop(name, None)

    def is_planned_weight(self, equation: Equation, index: int | None) -> bool:
        return equation.op == "weight" and _full(str(equation.attr["name"]), index) in self.plan.linears

    def planned(self, equation: Equation, templates: Mapping[str, str], index: int | None) -> str | None:
        """The full name of the weight of a product that the plan quantizes."""
        weight = equation.args[1] if equation.op == "matmul" else None
        if not isinstance(weight, Value) or weight.name not in templates:
            return None
        full = _full(templates[weight.name], index)
        return full if full in self.plan.linears else None

    def step(self, equation: Equation, scopes: list[Scope], index: int | None) -> None:
        shared: tuple[Tensor, ...] | None = None
        for runner, scope in zip(self.runners, scopes, strict=True):
            if shared is None or not REGISTRY[equation.op].source:
                shared = runner.equation(equation, scope, index)
            scope.update(zip((value.name for value in equation.results), shared, strict=True))

    def product(self, equation: Equation, full: str, scopes: list[Scope]) -> None:
        x = equation.args[0]
        assert isinstance(x, Value)
        own, exact = scopes[: self.rounded], scopes[self.rounded :]
        product = self.effective.pop(full)
        for scope in own:
            scope[equation.result.name] = product(scope[x.name])
        weight = self.weights(full).float() if exact else None
        for scope in exact:
            scope[equation.result.name] = REGISTRY["matmul"].body(scope[x.name], weight, transpose_b=True)

    def repeat(self, equation: Equation, scopes: list[Scope]) -> None:
        body, count = equation.body, equation.attr["count"]
        assert body is not None
        assert isinstance(count, int)
        carried = [[scope[value.name] for value in equation.values] for scope in scopes]
        for index in range(count):
            inner = [dict(scope) for scope in scopes]
            for scope, values in zip(inner, carried, strict=True):
                scope.update(zip((value.name for value in body.params), values, strict=True))
            self.block(body.equations, inner, index, body.results)
            carried = [[scope[value.name] for value in body.results] for scope in inner]
        for scope, values in zip(scopes, carried, strict=True):
            scope.update(zip((value.name for value in equation.results), values, strict=True))

    # -- one input and the linears that read it -----------------------------------------------------------------------

    def quantize(
        self,
        equations: Sequence[Equation],
        first: Equation,
        templates: Mapping[str, str],
        scopes: list[Scope],
        index: int | None,
    ) -> None:
        x = first.args[0]
        assert isinstance(x, Value)
        sharing = [self.planned(equation, templates, index) for equation in equations if equation.args[:1] == (x,)]
        linears = [self.plan.linears[name] for name in sharing if name is not None]
        path = self.folder / f"{linears[0].weight}.safetensors"
        if not path.is_file():
            seen = [scope[x.name] for scope in scopes]
            found = _quantized(linears, seen[: self.rounded], seen[self.rounded :], self.weights)
            save_file(found, f"{path}.partial")
            Path(f"{path}.partial").replace(path)
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        for linear in linears:
            self.effective[linear.weight] = _Product(linear, stored)
        self.done += len(linears)
        if self.progress is not None:
            self.progress("calibrate", self.done, len(self.plan.linears))


class _Product:
    """A linear as the quantized graph computes it, but for the base precision."""

    def __init__(self, linear: Linear, stored: Mapping[str, Tensor]) -> None:
        self.recipe = linear.recipe
        self.parts = {part: stored[f"{linear.weight}.{part}"] for part in PARTS if f"{linear.weight}.{part}" in stored}
        codes, scale, zero, outer = (self.parts.get(part) for part in PARTS[:4])
        assert codes is not None
        assert scale is not None
        self.weight = Quantized(codes, scale, zero, outer, linear.storage.block).dequantized()

    def __call__(self, x: Tensor) -> Tensor:
        if "smooth" in self.parts:
            x = x * self.parts["smooth"]
        seen = rounded(self.recipe, x.reshape(-1, x.shape[-1]).float(), self.parts).reshape(x.shape)
        result: Tensor = REGISTRY["matmul"].body(seen, self.weight, transpose_b=True)
        return result


def _quantized(
    linears: Sequence[Linear], seen: Sequence[Tensor], exact: Sequence[Tensor], weights: Weights
) -> dict[str, Tensor]:
    """Everything that is stored of the linears that share an input: `seen`, and `exact` before anything is rounded."""
    found: dict[str, Tensor] = {}
    first = linears[0].weight
    plain = [linear.recipe for linear in linears if not _meets_rounded(linear)]
    drifts = any(recipe.weights is not None and recipe.weights.rounding == "gptq" for recipe in plain)
    inputs = gather(seen, exact if drifts else (), products=drifts or any(_weighs_outputs(recipe) for recipe in plain))
    smoothed = [linear for linear in linears if linear.recipe.smooth is not None]
    factors: Tensor | None = None
    if smoothed:
        loaded = [(weights(linear.weight).float(), linear.storage) for linear in smoothed]
        factors = smoothing(smoothed[0].recipe, inputs, loaded)
        # under the name of each: a target may have fewer rows for some (in the last layer); they then share no value
        names = dict.fromkeys([first, *(linear.weight for linear in smoothed)])
        found |= {f"{name}.smooth": factors.clone() for name in names}
    by_recipe: dict[str, list[Linear]] = {}
    for linear in linears:
        by_recipe.setdefault(linear.recipe.name, []).append(linear)
    for alike in by_recipe.values():
        recipe = alike[0].recipe
        own = factors if recipe.smooth is not None else None
        ranged = inputs if own is None else inputs.smoothed(own)
        static = static_parts(recipe, ranged)
        found |= {f"{linear.weight}.{suffix}": static[suffix].clone() for linear in alike for suffix in static}
        met = _met(recipe, seen, exact, own, static) if _meets_rounded(alike[0]) else ranged
        for linear, made in zip(alike, _round(alike, weights, own, met), strict=True):
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


def _round(alike: Sequence[Linear], weights: Weights, factors: Tensor | None, inputs: Inputs) -> Iterator[Quantized]:
    """The weights of linears of one recipe, rounded as it says."""
    how, smooth = alike[0].recipe.weights, alike[0].recipe.smooth
    assert how is not None
    loaded = ((weights(linear.weight).float(), linear.storage) for linear in alike)
    moved = ((weight if factors is None else weight / factors, storage) for weight, storage in loaded)
    if how.rounding == "gptq":
        yield from round_second_order(list(moved), inputs)
        return
    for weight, storage in moved:
        if smooth is not None and smooth.clip:
            yield clipped(weight, storage, inputs).codes(weight, storage)
        else:
            yield round_weight(weight, storage, how.range)


def _weighs_outputs(recipe: Recipe) -> bool:
    """Whether a method weighs errors of weights by the outputs' error, for which it needs second moments."""
    return recipe.smooth is not None and (recipe.smooth.method == "awq" or recipe.smooth.clip)


def _meets_rounded(linear: Linear) -> bool:
    """Whether rounding makes up for errors, and that against inputs which are rounded themselves."""
    return _compensates(linear) and linear.recipe.activations is not None


def _compensates(linear: Linear) -> bool:
    return linear.recipe.weights is not None and linear.recipe.weights.rounding == "gptq"


def _full(template: str, index: int | None) -> str:
    return template if index is None else expand(template, index)


def _inputs(graph: Graph, runner: Runner, batch: NDArray[np.int64], rules: Rules) -> Scope:
    count, length = batch.shape
    given: dict[str, Any] = {
        "tokens": batch,
        "positions": np.broadcast_to(np.arange(length), batch.shape),
        "rows": np.broadcast_to(np.arange(count)[:, None], batch.shape),
        "token_types": np.zeros_like(batch),
    }
    given |= {name: [rule.apply(name, row) for row in batch.tolist()] for name, rule in rules.items()}
    scope: Scope = {}
    for value in graph.inputs:
        if value.name not in given:
            message = f"the model's input `{value.name}` does not follow from calibration tokens"
            raise SpecRTError("PREC-013", message, hint="take a precision that needs no calibration")
        scope[value.name] = runner.bind(value, torch.tensor(given[value.name], dtype=torch.int32))
    return scope
