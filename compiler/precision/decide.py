"""Recipe x toolchain x GPU -> how it runs, or why it can't; nothing here is a table of combinations.

Every step of the decision has a code, so that reports can group and tests can name them:

toolchain-gpu      the toolchain builds for the chip
base               what is not quantized
gpu-math           what the chip multiplies the quantized products in
toolchain-product  how the toolchain runs them
kv-cache           how keys and values are stored
kernels            whether kernels have all of a model that gets no engine (asked by the matrix: it knows the model)
hazard             it works, and something about it surprises
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from specs.errors import SpecRTError
from specs.hardware import Gpu, Operands, Product, Toolchain, gpu_names, load_gpu, maths_of, product_of
from specs.precision import Recipe, load_recipe


@dataclass(frozen=True)
class Reason:
    """One step of a decision; `ok` is False for the one that forbids it."""

    code: str
    text: str
    ok: bool = True


@dataclass(frozen=True)
class Decision:
    """How a recipe runs: `how` is plain, native, kernel, widen or emulate; None where it can't."""

    recipe: Recipe
    toolchain: Toolchain
    gpu: Gpu | None
    how: str | None
    base: str | None
    reasons: tuple[Reason, ...]

    @property
    def works(self) -> bool:
        """Whether nothing forbids it."""
        return all(reason.ok for reason in self.reasons)

    @property
    def alone(self) -> bool:
        """Whether no engine has the base precision: every segment is a program of kernels."""
        return self.base in self.toolchain.segments

    @property
    def lints(self) -> tuple[Reason, ...]:
        """The hazards."""
        return tuple(reason for reason in self.reasons if reason.code == "hazard")

    @property
    def target(self) -> str:
        """`tensorrt-8.6 on sm90`, or the toolchain alone."""
        return self.toolchain.name if self.gpu is None else f"{self.toolchain.name} on sm{self.gpu.sm}"

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "recipe": self.recipe.name,
            "toolchain": self.toolchain.name,
            "gpu": None if self.gpu is None else f"sm{self.gpu.sm}",
            "works": self.works,
            "how": self.how,
            "base": self.base,
            "reasons": [vars(reason) for reason in self.reasons],
        }


def decide(recipe: Recipe, toolchain: Toolchain, gpu: Gpu | None = None) -> Decision:
    """The decision for one combination; `gpu` is None for a CPU toolchain. Raises ValueError where they don't match."""
    if bool(toolchain.sm) != (gpu is not None):
        raise ValueError(f"{toolchain.name} {'needs' if toolchain.sm else 'has no'} GPU")
    reasons: list[Reason] = []
    if gpu is not None:
        reasons.append(_builds_for(toolchain, gpu))
    base, reason = _base(recipe, toolchain, gpu)
    reasons.append(reason)
    alone = base in toolchain.segments
    how: str | None = "kernel" if alone else "plain"
    if recipe.weights is not None:
        product = product_of(toolchain, _operands(recipe), None if gpu is None else gpu.sm)
        if gpu is not None:
            reasons.append(_math(recipe, gpu, product, maths_of(toolchain, _operands(recipe))))
        how = None if product is None else "kernel" if alone else product.how
        reasons.append(_told(recipe, toolchain, product, alone))
    if recipe.kv_cache is not None:
        reasons.append(_cache(recipe, toolchain, gpu))
    if gpu is not None:
        reasons += [Reason("hazard", text) for text in _hazards(recipe, base, gpu)]
    works = all(reason.ok for reason in reasons)
    return Decision(recipe, toolchain, gpu, how if works else None, base, tuple(reasons))


def require(decision: Decision) -> Decision:
    """The decision, if the combination works; raises SpecRTError PREC-010 with the reason and what could run there."""
    broken = next((reason for reason in decision.reasons if not reason.ok), None)
    if broken is None:
        return decision
    others = [
        name for name in decision.recipe.instead if decide(load_recipe(name), decision.toolchain, decision.gpu).works
    ]
    raise SpecRTError(
        "PREC-010",
        f"{decision.recipe.name} can't run with {decision.target}: {broken.text}",
        where=decision.recipe.where,
        hint=f"{' or '.join(others)} can" if others else None,
    )


def _builds_for(toolchain: Toolchain, gpu: Gpu) -> Reason:
    sms = toolchain.sm
    if gpu.sm in sms:
        return Reason("toolchain-gpu", f"{toolchain.name} builds for sm{gpu.sm}")
    return Reason("toolchain-gpu", f"{toolchain.name} builds for sm{sms[0]} to sm{sms[-1]}, not for sm{gpu.sm}", False)


def _base(recipe: Recipe, toolchain: Toolchain, gpu: Gpu | None) -> tuple[str | None, Reason]:
    """The first precision in the toolchain's order that the recipe allows and the chip has."""
    for name in toolchain.base:
        if name in recipe.base and (gpu is None or getattr(gpu.math, name) == "native"):
            alone = toolchain.segments.get(name)
            told = "" if alone is None else f", as kernel steps: {alone.note}"
            return name, Reason("base", f"{name} for what is not quantized{told}")
    if gpu is not None and not any(getattr(gpu.math, name) == "native" for name in recipe.base):
        needed = " or ".join(f"{name} needs {_chips(name)}" for name in recipe.base)
        return None, Reason("base", f"{needed}; sm{gpu.sm} has none", False)
    return None, Reason("base", f"{toolchain.name} has no {' or '.join(recipe.base)}", False)


def _math(recipe: Recipe, gpu: Gpu, product: Product | None, maths: set[str]) -> Reason:
    weights, activations = recipe.weights, recipe.activations
    assert weights is not None
    if recipe.compute == "base":
        return Reason("gpu-math", f"weights of {weights.type} are unpacked, products are in the base precision")
    if getattr(gpu.math, recipe.compute) in ("native", "slow"):
        return Reason("gpu-math", f"sm{gpu.sm} multiplies in {recipe.compute}")
    if product is not None and product.math is not None and activations is not None:
        where = "the base precision" if product.math == "base" else product.math
        text = f"inputs become {activations.type}, and their numbers are multiplied in {where}, which has them all"
        return Reason("gpu-math", f"sm{gpu.sm} has no products in {recipe.compute}: {text}")
    others = sorted(math for math in maths if math not in ("base", recipe.compute))
    needed = " or ".join(f"{math} needs {_chips(math)}" for math in (recipe.compute, *others))
    return Reason("gpu-math", f"{needed}; sm{gpu.sm} has no such tensor cores", False)


def _chips(math: str) -> str:
    """`SM89 or newer`, or the list where newer ones lack it."""
    having = [load_gpu(name).sm for name in gpu_names() if getattr(load_gpu(name).math, math) in ("native", "slow")]
    newer = [load_gpu(name).sm for name in gpu_names() if having and load_gpu(name).sm >= having[0]]
    return f"SM{having[0]} or newer" if having == newer else ", ".join(f"SM{sm}" for sm in having)


def _operands(recipe: Recipe) -> Operands:
    """What meets in the products of a recipe."""
    weights, how = recipe.weights, recipe.activations
    assert weights is not None
    return Operands(weights.type) if how is None else Operands(weights.type, how.type, how.mode, how.per, how.block)


def _told(recipe: Recipe, toolchain: Toolchain, product: Product | None, alone: bool) -> Reason:
    if product is not None and alone and product.how != "kernel":
        return Reason("toolchain-product", "kernel: as all products, since no engine has the base precision")
    if product is not None:
        held = ", in engines that hold their weights, else as a kernel step" if product.baked else ""
        return Reason("toolchain-product", f"{product.how}{held}: {product.note}")
    weights, activations = recipe.weights, recipe.activations
    assert weights is not None
    inputs = "wide inputs" if activations is None else f"{activations.mode} {activations.type} inputs"
    return Reason("toolchain-product", f"{toolchain.name} has no product of {weights.type} and {inputs} there", False)


def _cache(recipe: Recipe, toolchain: Toolchain, gpu: Gpu | None) -> Reason:
    held = toolchain.kv_cache.get(str(recipe.kv_cache))
    if held is None:
        return Reason("kv-cache", f"{toolchain.name} has no KV cache of {recipe.kv_cache}", False)
    if recipe.kv_cache == "fp8" and gpu is not None and gpu.fp8_storage == "none":
        return Reason("kv-cache", f"sm{gpu.sm} can't convert from FP8; SM80 or newer can", False)
    return Reason("kv-cache", f"{recipe.kv_cache}, {held.how}: {held.note}")


def _hazards(recipe: Recipe, base: str | None, gpu: Gpu) -> list[str]:
    used = {recipe.compute if recipe.compute != "base" else base}
    return [hazard.text for hazard in gpu.hazards if used & set(hazard.math)]
