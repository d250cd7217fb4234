"""Which weights are quantized and how, before any equation changes: recipes meet the products of a graph.

A linear is a product of an activation with a weight [..., out, in]. Overrides come first, then what the recipe
excludes, then what its format can't hold; every linear that stays in the base precision has a reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from compiler.ir.core import Equation, Graph, Value, used_values, walk
from compiler.ir.names import expand, is_template
from specs.errors import SpecRTError, Where
from specs.precision import Recipe, Smooth

_LAYER = re.compile(r"^\w+\.(?:\d+|\{[^}]*\})\.")


@dataclass(frozen=True)
class Storage:
    """How one weight is stored: types and shapes of codes, scale, zero and outer scale."""

    type: str
    shape: tuple[int, ...]
    scale: str
    scale_shape: tuple[int, ...]
    block: tuple[int, ...]
    zero: bool
    outer: bool
    permuted: bool = False  # inputs are put in the order of their groups first

    def of_one(self) -> Storage:
        """That of one matrix of several."""
        return replace(self, shape=self.shape[1:], scale_shape=self.scale_shape[1:])


@dataclass(frozen=True)
class Linear:
    """A quantized linear: its weight by full name, how it is stored, and by which recipe."""

    weight: str
    storage: Storage
    recipe: Recipe

    @property
    def experts(self) -> bool:
        """Whether it is the matrices of experts, [experts, out, in]."""
        return len(self.storage.shape) > 2

    @property
    def smooth(self) -> Smooth | None:
        """How its input is smoothed: that of experts is not, factors that suit one would meet all of them."""
        return None if self.experts else self.recipe.smooth


@dataclass(frozen=True)
class Override:
    """A recipe for the linears that a pattern names; None keeps them in the base precision."""

    patterns: tuple[str, ...]
    recipe: Recipe | None
    where: Where | None = None


Experts = Callable[[Storage], "str | None"]


@dataclass
class QuantizationPlan:
    """What `quantize` does: linears by the full name of their weight, and why others stay as they are.

    `seldom` is told by calibration: experts of a weight that got too few tokens for its recipe's method.
    """

    recipe: Recipe
    overrides: tuple[Override, ...] = ()
    linears: dict[str, Linear] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    seldom: dict[str, tuple[int, ...]] = field(default_factory=dict)


def plan_quantization(
    graph: Graph,
    recipe: Recipe,
    overrides: Sequence[Override] = (),
    stored: Mapping[str, Linear | str] | None = None,
    experts: Experts | None = None,
) -> QuantizationPlan:
    """The plan for a graph; `stored`: linears as the checkpoint has them, in place of the recipe.

    `experts`: why matrices of experts that would be stored so stay as they are, or None. Raises SpecRTError PREC-011
    where an override names no linear.
    """
    plan = QuantizationPlan(recipe, tuple(overrides))
    used: set[int] = set()
    for name, equation, weight in linears_of(graph):
        chosen, why, index = _choose(name, recipe, plan.overrides)
        used |= {index} if index is not None else set()
        if chosen is None or chosen.weights is None:
            if why:
                plan.kept[name] = why
            continue
        reason = _refusal(graph, equation, weight)
        if equation.op == "gather_matmul" and reason is None:
            again = "matrices of experts are not rounded again" if index is not None and stored is not None else None
            reason = again or experts_kept(chosen)
        if index is None and stored is not None:
            own = reason or stored.get(name, "the checkpoint has it in the base precision")
        else:
            storage = reason or storage_of(chosen, weight.type.static_shape())
            own = Linear(name, storage, chosen) if isinstance(storage, Storage) else storage
        if isinstance(own, Linear) and equation.op == "gather_matmul" and experts is not None:
            own = experts(own.storage) or own
        if isinstance(own, Linear):
            plan.linears[name] = own
        else:
            plan.kept[name] = own
    for index, override in enumerate(plan.overrides):
        if index not in used:
            known = sorted({leaf_of(name) for name, _, _ in linears_of(graph)})
            raise SpecRTError(
                "PREC-011", f"no linear is named {' or '.join(f'`{text}`' for text in override.patterns)}",
                where=override.where, hint=f"known: {', '.join(known)}; a pattern may use `*` and a layer's whole name",
            )  # fmt: skip
    return plan


def experts_kept(recipe: Recipe) -> str | None:
    """Why a recipe leaves matrices of experts as they are, or None."""
    if recipe.activations is not None:
        return "inputs of experts are not rounded"
    if recipe.calibration is not None and recipe.weights is not None and recipe.weights.outer:
        return "calibration has no scale for all experts"
    return None


def linears_of(graph: Graph) -> Iterator[tuple[str, Equation, Value]]:
    """Every product with a weight: the weight's full name (one for each round), the product, the weight's value."""
    outer = {equation.result.name: equation for equation in graph.equations if equation.op == "weight"}
    for top in graph.equations:
        inner = walk((top,))
        inside = {equation.result.name: equation for equation in walk((top,)) if equation.op == "weight"}
        count = top.attr.get("count", 1) if top.body is not None else 1
        assert isinstance(count, int)
        for equation in inner:
            plain = equation.op == "matmul" and equation.attr.get("transpose_b")
            weight = equation.args[1] if plain or equation.op == "gather_matmul" else None
            source = {**outer, **inside}.get(weight.name) if isinstance(weight, Value) else None
            if source is None or not isinstance(weight, Value) or not weight.type.is_float:
                continue
            template = str(source.attr["name"])
            for index in range(count if is_template(template) else 1):
                yield expand(template, index), equation, weight


def leaf_of(weight: str) -> str:
    """`attn.q` of `layers.3.attn.q.weight`."""
    return _LAYER.sub("", weight).removesuffix(".weight")


def matches(weight: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern names a weight: by its leaf (`attn.q`) or its whole name (`layers.3.attn.q`)."""
    names = (leaf_of(weight), weight.removesuffix(".weight"))
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _choose(name: str, recipe: Recipe, overrides: Sequence[Override]) -> tuple[Recipe | None, str, int | None]:
    for index, override in enumerate(overrides):
        if matches(name, override.patterns):
            return override.recipe, f"`{' '.join(override.patterns)}` keeps it in the base precision", index
    for entry in recipe.exclude:
        if matches(name, entry.linears):
            return None, entry.why, None
    return recipe, "", None


def _refusal(graph: Graph, product: Equation, weight: Value) -> str | None:
    readers = [
        equation
        for equation in walk(graph.equations)
        if equation.body is None and any(value.name == weight.name for value in used_values(equation))
    ]
    others = [equation.op for equation in readers if equation is not product]
    if others:
        return f"the weight is also read by `{others[0]}`"
    blocks = (graph.equations, *(top.body.equations for top in graph.equations if top.body is not None))
    together = any(
        any(inner is product for inner in block) and any(weight in inner.results for inner in block) for block in blocks
    )
    return None if together else "all layers share the weight"


def storage_of(recipe: Recipe, shape: tuple[int, ...]) -> Storage | str:
    """How a recipe stores a weight [..., out, in], or why it can't."""
    weights, activations = recipe.weights, recipe.activations
    assert weights is not None
    *lead, rows, width = shape
    if activations is not None and activations.block is not None and width % activations.block:
        return f"{width} inputs are no multiple of the {activations.block} that share a scale"
    per, block = weights.per, 0
    if per in ("group", "square"):
        block = next((size for size in weights.group if width % size == 0), 0)
        if not block and weights.otherwise == "keep":
            return f"{width} inputs are no multiple of {' or '.join(map(str, weights.group))}"
        per = per if block else "row"
    sizes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        "tensor": ((*(1 for _ in lead), 1, 1), ()) if not lead else ((*lead, 1, 1), ()),
        "row": ((*lead, rows, 1), ()),
        "group": ((*lead, rows, width // block), (1, block)) if block else ((), ()),
        "square": ((*lead, -(-rows // block), width // block), (block, block)) if block else ((), ()),
    }
    scale_shape, blocks = sizes[per]
    return Storage(weights.type, shape, weights.scale, scale_shape, blocks, not weights.symmetric, weights.outer)


def by_round(plan: QuantizationPlan, templates: Sequence[str], count: int) -> list[Mapping[str, Linear]]:
    """For each round of a `repeat` the quantized linears by template."""
    return [
        {text: plan.linears[name] for text in templates if (name := expand(text, index)) in plan.linears}
        for index in range(count)
    ]
