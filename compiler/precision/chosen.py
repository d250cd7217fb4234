"""What a request's precision comes to: the recipe, exceptions for some layers, the decision for the target, passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from compiler.passes import pipelines
from compiler.passes.quantization_plan import Override, QuantizationPlan
from compiler.passes.quantize import quantize
from compiler.passes.runner import Pass
from compiler.passes.store_halves import STORE_HALVES
from compiler.precision.decide import Decision, decide, require
from specs.errors import SpecRTError, Where
from specs.hardware import load_gpu, load_toolchain
from specs.precision import Recipe, load_recipe


@dataclass(frozen=True)
class LayerPrecision:
    """A key `layers` of a deployment spec: patterns over linears, and the precision that they get."""

    linears: tuple[str, ...]
    precision: str
    where: Where | None = None


@dataclass(frozen=True)
class Chosen:
    """A precision for a target; `plans` is filled when its passes have run."""

    target: str
    recipe: Recipe
    decision: Decision
    overrides: tuple[Override, ...]
    plans: list[QuantizationPlan] = field(default_factory=list, compare=False)

    @property
    def base(self) -> str:
        """The precision of what is not quantized."""
        assert self.decision.base is not None  # require() has seen to it
        return self.decision.base

    @property
    def plan(self) -> QuantizationPlan | None:
        """What was quantized and why not, where anything was asked for."""
        return self.plans[-1] if self.plans else None

    def passes(self, role: str) -> tuple[Pass, ...]:
        """The whole pipeline for a role. 16-bit floats of the IR are computed in; where only stored, they are cast."""
        stored_only = self.base == "fp16" and self.target == "cpu"
        quantized = self.recipe.weights is not None or self.overrides
        change = (quantize(self.recipe, self.overrides, self.plans.append),) if quantized else ()
        pipeline = pipelines.pipeline(role, "fp32" if stored_only else self.base, self.target, change)
        return (*pipeline, STORE_HALVES) if stored_only else pipeline

    def needing_data(self) -> str | None:
        """The recipe among those in use that needs calibration, if any."""
        plan = self.plan
        if plan is None:
            return None
        recipes = {linear.recipe.name: linear.recipe for linear in plan.linears.values()}
        return next((name for name, recipe in recipes.items() if recipe.calibration is not None), None)


def choose(target: str, toolchain_name: str, precision: str, layers: Sequence[LayerPrecision] = ()) -> Chosen:
    """The precision for a target, cpu or a GPU; raises SpecRTError PREC-001, PREC-002, PREC-010, PREC-015, PREC-016."""
    recipe = load_recipe(precision)
    toolchain, gpu = load_toolchain(toolchain_name), None if target == "cpu" else load_gpu(target)
    decision = require(decide(recipe, toolchain, gpu))
    if gpu is not None and (recipe.weights is not None or layers or decision.base == "tf32"):
        raise SpecRTError(
            "PREC-016", f"{recipe.name} is decided for {decision.target} ({decision.how}), but not written by it yet",
            where=recipe.where, hint="fp16, bf16 and fp32 are; on the CPU all are",
        )  # fmt: skip
    overrides = []
    for entry in layers:
        other = load_recipe(entry.precision)
        if other.weights is None and other.name != decision.base:
            message = f"`{entry.precision}` for some layers of a model whose base precision is {decision.base}"
            hint = f"a layer is quantized, or stays in the base precision: `precision: {decision.base}`"
            raise SpecRTError("PREC-015", message, where=entry.where, hint=hint)
        if other.weights is not None:
            require(decide(other, toolchain, gpu))
        overrides.append(Override(entry.linears, other if other.weights is not None else None, entry.where))
    return Chosen(target, recipe, decision, tuple(overrides))
