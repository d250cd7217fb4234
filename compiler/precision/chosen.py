"""What a request's precision comes to: the recipe, exceptions for some layers, the decision for the target, passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from compiler.passes import pipelines
from compiler.passes.quantization_plan import Experts, Override, QuantizationPlan
from compiler.passes.quantize import quantize
from compiler.passes.round_kv_cache import round_kv_cache
from compiler.passes.runner import Pass
from compiler.passes.store_halves import STORE_HALVES
from compiler.precision.decide import Decision, decide, require
from compiler.quantization.stored_codes import Stored
from specs.errors import SpecRTError, Where
from specs.hardware import load_gpu, load_toolchain
from specs.precision import STORED, Recipe, load_caches, load_recipe, stored_recipe, with_cache


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
    stored: Stored | None = None  # the checkpoint's own codes, where they are kept
    native: bool = False  # TensorRT's own attention and cache layers
    experts: Experts | None = None  # why matrices of experts stored so keep their type on the target
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

    def passes(self, role: str, *split: Pass) -> tuple[Pass, ...]:
        """The whole pipeline for a role; `split` makes the graph of one of several ranks.

        16-bit floats of the IR are computed in; where only stored, they are cast.
        Raises SpecRTError PREC-018 for a KV cache of an encoder.
        """
        if role == "encoder" and self.recipe.kv_cache is not None:
            message = f"an encoder has no KV cache to keep in {self.recipe.kv_cache}"
            raise SpecRTError("PREC-018", message, hint="leave `kv_cache` out")
        stored_only = self.base == "fp16" and self.target == "cpu"
        quantized = self.recipe.weights is not None or self.overrides
        own = None if self.stored is None else self.stored.linears
        change = (quantize(self.recipe, self.overrides, self.plans.append, own, self.experts),) if quantized else ()
        codes, emulated = self.cache
        base = "fp32" if stored_only else self.base
        kept = None if emulated else codes
        pipeline = pipelines.pipeline(role, base, self.target, change, kept, split, native=self.native)
        if codes is not None and emulated:
            pipeline = (*pipeline, round_kv_cache(codes))
        return (*pipeline, STORE_HALVES) if stored_only else pipeline

    @property
    def cache(self) -> tuple[str | None, bool]:
        """The codes of an 8-bit KV cache, None without one, and whether they are only rounded to."""
        name = self.recipe.kv_cache
        if name is None:
            return None, False
        return load_caches()[name].codes, self.decision.toolchain.kv_cache[name].how == "emulate"

    @property
    def quantized(self) -> bool:
        """Whether weights or the KV cache are in low-bit types."""
        return bool(self.recipe.weights or self.overrides or self.recipe.kv_cache)

    def needing_data(self) -> str | None:
        """The recipe among those in use that needs calibration, if any."""
        plan = self.plan
        if plan is None:
            return None
        recipes = {linear.recipe.name: linear.recipe for linear in plan.linears.values()}
        return next((name for name, recipe in recipes.items() if recipe.calibration is not None), None)


def choose(
    target: str,
    toolchain_name: str,
    precision: str | None,
    layers: Sequence[LayerPrecision] = (),
    stored: Stored | None = None,
    kv_cache: str | None = None,
    *,
    native: bool = False,
    experts: Experts | None = None,
) -> Chosen:
    """The precision for a target, cpu or a GPU; None: as a low-bit checkpoint has its weights, else fp32.

    `experts`: why matrices of experts that would be stored so keep their type there, or None.

    Raises SpecRTError PREC-001, PREC-002, PREC-010, PREC-015 and PREC-017.
    """
    toolchain, gpu = load_toolchain(toolchain_name), None if target == "cpu" else load_gpu(target)
    recipes = [with_cache(recipe, kv_cache) for recipe in _recipes(precision, stored)]
    decisions = [require(decide(recipe, toolchain, gpu)) for recipe in recipes]
    recipe, decision = recipes[0], decisions[0]
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
    return Chosen(
        target, recipe, decision, tuple(overrides), stored if recipe.name == STORED else None, native, experts
    )


def _recipes(precision: str | None, stored: Stored | None) -> list[Recipe]:
    """The recipe asked for; of a checkpoint's own codes one for each type of theirs."""
    own = [] if stored is None else [stored_recipe(dtype, stored.where) for dtype in stored.types()]
    if precision is None:
        return own or [load_recipe("fp32")]
    if precision != STORED:
        return [load_recipe(precision)]
    if not own:
        reasons = {why for why in (stored.linears.values() if stored is not None else ()) if isinstance(why, str)}
        told = next(iter(reasons), "its weights are floats")
        raise SpecRTError(
            "PREC-017",
            f"there are no codes to keep in this checkpoint: {told}",
            hint="leave `precision` out, or name a recipe: fp16, w8a16, w4a16_awq",
        )
    return own
