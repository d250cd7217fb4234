"""The schema of a precision recipe (specs/precisions/*.yaml): what is stored, what is computed, how it is calibrated.

A recipe knows no model and no target. `compiler.precision` computes where it runs; passes and algorithms carry it out.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from specs.errors import SpecRTError, Where
from specs.fields import Float, Numbers, Sequence, Texts, Word
from specs.node import Bool, Int, Node, Text
from specs.yaml_loader import load_yaml

VERSION = 1
FOLDER = Path(__file__).parent / "precisions"


class Weights(Node):
    """How the weights of quantized linears are stored."""

    title: ClassVar[str] = "`weights`"
    type: Annotated[Literal["i8", "i4", "u4", "f8e4m3", "f4e2m1"], Word] = Field(description="element type")
    per: Annotated[Literal["tensor", "row", "group", "square"], Word] = Field(
        description="what shares a scale: all, an output, `group` inputs of an output, a square of `group`"
    )
    group: Numbers = Field((), description="inputs for each scale: the first that divides a linear's inputs")
    otherwise: Annotated[Literal["row", "keep"], Word] = Field(
        "keep", description="where no group divides: one scale for each output, or the linear is left alone"
    )
    scale: Annotated[Literal["f32", "f16", "f8e4m3", "f8e8m0"], Word] = Field(
        "f32", description="element type of the scales"
    )
    outer: Bool = Field(False, description="a second float32 scale for the whole weight")
    symmetric: Bool = Field(True, description="no zero point")
    range: Annotated[Literal["max", "mse"], Word] = Field(
        "max", description="largest magnitude, or the range with the least square error"
    )
    rounding: Annotated[Literal["nearest", "gptq"], Word] = Field(
        "nearest", description="each alone, or each after the errors of those before it (gptq)"
    )


class Activations(Node):
    """How the inputs of quantized linears are rounded before the product."""

    title: ClassVar[str] = "`activations`"
    type: Annotated[Literal["i8", "f8e4m3", "f4e2m1"], Word] = Field(description="element type")
    per: Annotated[Literal["tensor", "token", "block"], Word] = Field(
        description="what shares a scale: all, a token, `block` of a token"
    )
    block: Int | None = Field(None, description="inputs for each scale")
    scale: Annotated[Literal["f32", "f8e4m3", "f8e8m0"], Word] = Field("f32", description="element type of the scales")
    mode: Annotated[Literal["static", "dynamic"], Word] = Field(
        description="scale from calibration, or from the values at hand"
    )
    range: Annotated[Literal["max", "percentile", "mse"], Word] = Field(
        "max", description="how calibration chooses a static range"
    )


class Smooth(Node):
    """Factors that move difficulty between activations and weights: x / s and W s."""

    title: ClassVar[str] = "`smooth`"
    method: Annotated[Literal["smoothquant", "awq"], Word] = Field(description="how s follows from calibration")
    steps: Int = Field(20, description="strengths tried between 0 and 1; the least output error wins")
    clip: Bool = Field(False, description="then search how far to clip each group of weights")


class Calibration(Node):
    """How many tokens the algorithms look at."""

    title: ClassVar[str] = "`calibration`"
    windows: Int = Field(description="windows of tokens")
    length: Int = Field(description="tokens in a window")


class Exclude(Node):
    """Linears that stay in the base precision, and why."""

    title: ClassVar[str] = "an entry of `exclude`"
    linears: Texts = Field(description="patterns over our names, say `head` or `*.router`")
    why: Text = Field(description="the reason, shown by explain")


class Bound(Node):
    """How far logits may be from float32's; `source` says where the numbers come from."""

    title: ClassVar[str] = "`bound`"
    mean_kl: Float = Field(description="mean KL divergence of the next-token distributions, nats")
    relative: Float = Field(description="|logits - reference| / |reference|, Frobenius norms")
    source: Text = Field(description="measurement or theorem")


class Cache(Node):
    """One way to store keys and values in 8 bits, for any recipe."""

    title: ClassVar[str] = "an entry of `caches`"
    codes: Annotated[Literal["u8", "f8e4m3"], Word] = Field(description="what a token's numbers become")
    source: dict[str, Text] = Field(description="where it comes from: `paper`, `code`, ...")
    bound: Bound = Field(description="how far it alone may take the result")


class Caches(Node):
    """All ways to store keys and values in 8 bits."""

    title: ClassVar[str] = "the file of KV caches"
    kv_cache: Int = Field(description=f"version of this schema: {VERSION}")
    caches: dict[str, Cache]


class Recipe(Node):
    """One precision: everything that a compile needs to know about it."""

    title: ClassVar[str] = "a precision recipe"
    precision: Int = Field(description=f"version of this schema: {VERSION}")
    name: Text = Field(description="the file's name")
    source: dict[str, Text] = Field(description="where it comes from: `paper`, `code`, ...")
    base: Texts = Field(description="precision of all that is not quantized: the first that the target has")
    compute: Annotated[Literal["base", "int8", "fp8", "nvfp4", "mxfp8", "mxfp4"], Word] = Field(
        "base", description="what the products of quantized linears multiply in"
    )
    weights: Weights | None = Field(None, description="left out: weights stay in the base precision")
    activations: Activations | None = Field(None, description="left out: activations stay in the base precision")
    smooth: Smooth | None = None
    calibration: Calibration | None = Field(None, description="left out: no data is needed")
    kv_cache: Annotated[Literal["int8", "fp8"], Word] | None = Field(
        None, description="how keys and values are stored (specs/kv_cache.yaml); left out: the base precision"
    )
    exclude: Annotated[tuple[Exclude, ...], Sequence] = Field((), description="linears left alone by default")
    instead: Texts = Field((), description="recipes to name where this one can't run")
    bound: Bound = Field(description="how far the result may be from float32")


@lru_cache(maxsize=1)
def load_caches() -> dict[str, Cache]:
    """The 8-bit KV caches by name, int8 and fp8."""
    return Caches.model_validate(load_yaml(FOLDER.parent / "kv_cache.yaml")).caches


def with_cache(recipe: Recipe, name: str | None) -> Recipe:
    """The recipe with another KV cache and the bound of both; None leaves it as it is.

    KL divergence is quadratic in the error of the logits and errors add up, so its roots do.
    """
    if name is None or name == recipe.kv_cache:
        return recipe
    own, more = recipe.bound, load_caches()[name].bound
    both = {
        "mean_kl": (own.mean_kl**0.5 + more.mean_kl**0.5) ** 2,
        "relative": own.relative + more.relative,
        "source": f"{recipe.name}: {own.source}; {name} cache: {more.source}",
    }
    return recipe.model_copy(update={"kv_cache": name, "bound": own.model_copy(update=both)})


def recipe_names() -> tuple[str, ...]:
    """The recipes that come with SpecRT, sorted."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by name, or from a YAML file of the user's; raises SpecRTError PREC-001, SPEC-0xx with file:line."""
    text = str(name)
    if not text.endswith(".yaml"):
        if text not in recipe_names():
            known = ", ".join(recipe_names())
            raise SpecRTError(
                "PREC-001", f"unknown precision `{text}`", hint=f"known: {known}; or a recipe file (.yaml)"
            )
        text = str(FOLDER / f"{text}.yaml")
    return _load(text)


@lru_cache(maxsize=64)
def _load(path: str) -> Recipe:
    recipe: Recipe = Recipe.model_validate(load_yaml(path))
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    """What one field can't say alone."""
    problem, where = None, recipe.where
    weights, activations = recipe.weights, recipe.activations
    if recipe.precision != VERSION:
        problem = f"this recipe is of schema {recipe.precision}, this version of specrt reads schema {VERSION}"
    elif recipe.name != Path(recipe.where.file).stem:
        problem = f"the recipe is named `{recipe.name}`, its file `{Path(recipe.where.file).name}`"
    elif weights is not None and (weights.per in ("group", "square")) != bool(weights.group):
        problem, where = f"`group` goes with `per: group` and `per: square`, not with `{weights.per}`", weights.where
    elif weights is not None and weights.symmetric != (weights.type != "u4"):
        problem, where = "`u4` has a zero point and every other type has none", weights.where
    elif activations is not None and (activations.per == "block") != (activations.block is not None):
        problem, where = f"`block` goes with `per: block`, not with `{activations.per}`", activations.where
    elif activations is not None and weights is None:
        problem, where = "`activations` without `weights`", activations.where
    elif recipe.compute != "base" and activations is None:
        problem = (
            f"`compute: {recipe.compute}` without `activations`: products of wide inputs are in the base precision"
        )
    elif recipe.calibration is None and (needs := needs_calibration(recipe)):
        problem = f"{needs} needs `calibration`"
    if problem is not None:
        raise SpecRTError("PREC-002", problem, where=where)


STORED = "checkpoint"
"""The precision that keeps a checkpoint's own low-bit weights as they are."""


def stored_recipe(dtype: str, where: Where) -> Recipe:
    """The recipe of weights whose codes a checkpoint holds: nothing is rounded, activations stay wide."""
    weights = Weights.model_construct(type=dtype, per="row", where=where)
    text = "the checkpoint's own numbers; float32 sums in another order, as tests/families"
    bound = Bound.model_construct(mean_kl=1e-6, relative=1e-4, source=text, where=where)
    return Recipe.model_construct(
        precision=VERSION, name=STORED, source={"code": where.file}, base=("bf16", "fp16", "fp32"), weights=weights,
        instead=("w8a16", "w4a16", "fp16") if dtype not in ("i4", "u4") else ("w4a16", "w8a16", "fp16"), bound=bound,
        where=where,
    )  # fmt: skip


def needs_calibration(recipe: Recipe) -> str | None:
    """What of a recipe looks at data, or None."""
    if recipe.smooth is not None:
        return f"`smooth: {recipe.smooth.method}`"
    if recipe.weights is not None and recipe.weights.rounding == "gptq":
        return "`rounding: gptq`"
    if recipe.activations is not None and recipe.activations.mode == "static":
        return "`mode: static`"
    return None
