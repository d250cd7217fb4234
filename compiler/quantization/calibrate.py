"""Calibration: runs the float graph over all windows at once, equation by equation, and quantizes each linear it meets.

Any graph will do, no model code is needed: the inputs of a product are at hand when it is reached. All products that
share an input are quantized together, and what follows sees their outputs with the rounded weights. One layer's weights
are in memory at a time; results go to a folder, one file for each input, which an interrupted run takes up again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from compiler.quantization.activations import rounded
from compiler.quantization.experts import Routed, quantized_experts, seldom
from compiler.quantization.experts import product as multiplied
from compiler.quantization.rounding import Quantized
from compiler.quantization.shared_input import compensates, quantized
from runtime.derive import Rules
from specs.errors import SpecRTError

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
        if any(compensates(linear) for linear in self.plan.linears.values()):
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
        weight = equation.args[1] if equation.op in ("matmul", "gather_matmul") else None
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
        weight = self.weights(full) if exact else None
        if product.linear.experts:
            (experts, out, _), seen = product.linear.storage.shape, self.routed(equation, scopes)
            results = multiplied(seen[: len(own)], product.of_expert, experts, out)
            if weight is not None:
                results += multiplied(seen[len(own) :], lambda expert: weight[expert].float(), experts, out)
        else:
            results = [product(scope[x.name]) for scope in own]
            if weight is not None:
                wide = weight.float()
                results += [REGISTRY["matmul"].body(scope[x.name], wide, transpose_b=True) for scope in exact]
        for scope, result in zip(scopes, results, strict=True):
            scope[equation.result.name] = result

    def routed(self, equation: Equation, scopes: list[Scope]) -> list[Routed]:
        x, _, chosen = equation.values
        return [Routed(scope[x.name], scope[chosen.name]) for scope in scopes]

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
        sharing = [
            self.planned(equation, templates, index)
            for equation in equations
            if equation.op == first.op and (equation.args[0], *equation.args[2:]) == (x, *first.args[2:])
        ]
        linears = [self.plan.linears[name] for name in sharing if name is not None]
        path = self.folder / f"{linears[0].weight}.safetensors"
        if not path.is_file():
            if linears[0].experts:
                found = quantized_experts(linears, self.routed(first, scopes[: self.rounded]), self.weights)
            else:
                seen = [scope[x.name] for scope in scopes]
                found = quantized(linears, seen[: self.rounded], seen[self.rounded :], self.weights)
            save_file(found, f"{path}.partial")
            Path(f"{path}.partial").replace(path)
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        for linear in linears:
            self.effective[linear.weight] = _Product(linear, stored)
            tokens = stored.get(f"{linear.weight}.tokens")
            if tokens is not None and (few := seldom(linear, tokens)):
                self.plan.seldom[linear.weight] = few
        self.done += len(linears)
        if self.progress is not None:
            self.progress("calibrate", self.done, len(self.plan.linears))


class _Product:
    """A linear as the quantized graph computes it, but for the base precision."""

    def __init__(self, linear: Linear, stored: Mapping[str, Tensor]) -> None:
        self.linear = linear
        self.parts = {part: stored[f"{linear.weight}.{part}"] for part in PARTS if f"{linear.weight}.{part}" in stored}
        codes, scale, zero, outer = (self.parts.get(part) for part in PARTS[:4])
        assert codes is not None
        assert scale is not None
        self.codes = Quantized(codes, scale, zero, outer, linear.storage.block)
        self.weight = None if linear.experts else self.codes.dequantized()

    def of_expert(self, expert: int) -> Tensor:
        """The matrix of one expert."""
        return self.codes.of_one(expert).dequantized()

    def __call__(self, x: Tensor) -> Tensor:
        if "smooth" in self.parts:
            x = x * self.parts["smooth"]
        seen = rounded(self.linear.recipe, x.reshape(-1, x.shape[-1]).float(), self.parts).reshape(x.shape)
        result: Tensor = REGISTRY["matmul"].body(seen, self.weight, transpose_b=True)
        return result


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
