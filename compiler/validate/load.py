"""What a model asks of a GPU in a precision, from shapes and the recipe alone: bytes, bits, operations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd, prod
from types import MappingProxyType

from compiler.ir.cache_rows import HEAD
from compiler.ir.core import Equation, Graph, Value, walk
from compiler.ir.types import DTYPES
from compiler.passes.quantization_plan import experts_kept, leaf_of, matches
from compiler.passes.split_weights import LEAST
from compiler.sizes import cache_bytes_per_token, cache_rows_per_token, counted
from compiler.validate.fit import Load
from specs.precision import Recipe

BASE_BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}
_KEEPS = ("dequantize", "cast", "concat")  # of a weight, what is still the weight


@dataclass(frozen=True)
class Weight:
    """A weight of all layers together: its name without the layer, shape, how many there are, and who reads it."""

    name: str
    shape: tuple[int, ...]
    count: int
    multiplied: bool  # by a product, whole at every step
    active: float  # share of it that a token uses: below 1 for experts
    dtype: str  # as the graph has it

    @property
    def numbers(self) -> int:
        """How many numbers all of them hold."""
        return prod(self.shape) * self.count


def weights_in(graph: Graph) -> Iterator[Weight]:
    """The weights of a graph; one that several operations read counts once."""
    readers: dict[str, list[tuple[Equation, int]]] = {}
    for equation in walk(graph.equations):
        for place, value in enumerate(equation.values):
            readers.setdefault(value.name, []).append((equation, place))

    def active(value: Value) -> float:
        """The greatest share that a reader takes for a token, also through what only unpacks it."""
        shares = [0.0]
        for equation, place in readers.get(value.name, ()):
            if equation.op == "gather_matmul" and place == 1:
                chosen, experts = equation.values[2].type.shape[-1], value.type.shape[0]
                assert isinstance(chosen, int)
                assert isinstance(experts, int)
                shares.append(chosen / experts)
            else:
                shares.append(active(equation.result) if equation.op in _KEEPS else 1.0)
        return max(shares)

    for equation, count in counted(graph.equations):
        if equation.op != "weight":
            continue
        name, value = leaf_of(str(equation.attr["name"])), equation.result
        multiplied = value.type.rank > 1 and any(
            reader.op != "gather" or place > 0 for reader, place in readers.get(value.name, ())
        )
        yield Weight(name, value.type.static_shape(), count, multiplied, active(value), value.type.dtype)


@dataclass(frozen=True)
class Share:
    """What one of several ranks has of a weight: in all, and of what products read; and its parts along inputs."""

    stored: float = 1.0  # more where it has a part beside the whole: tied embeddings
    read: float = 1.0
    parts: int = 1


WHOLE = Share()


def shares_in(graph: Graph) -> dict[str, Share]:
    """What a rank has of each weight of its graph that is split, by the name without the layer."""
    slices: dict[str, list[Equation]] = {}
    wholes: set[str] = set()
    for equation in walk(graph.equations):
        for value in equation.values:
            if equation.op == "slice":
                slices.setdefault(value.name, []).append(equation)
            else:
                wholes.add(value.name)
    found = {}
    for equation in walk(graph.equations):
        if equation.op != "weight" or equation.result.name not in slices:
            continue
        size = prod(equation.result.type.static_shape())
        part = sum(prod(cut.result.type.static_shape()) / size for cut in slices[equation.result.name])
        inputs = int(str(equation.result.type.shape[-1]))
        parts = inputs // min(int(str(cut.result.type.shape[-1])) for cut in slices[equation.result.name])
        name = leaf_of(str(equation.attr["name"]))
        found[name] = Share(part + (equation.result.name in wholes), part, parts)
    return found


def bits(weight: Weight, recipe: Recipe, base: str, parts: int = 1) -> float:
    """Bits that a number of a weight takes, its share of scales and zero points included; `parts`: of its inputs."""
    plain, store = 8.0 * BASE_BYTES[base], recipe.weights
    if store is None or not _low(weight, recipe):
        return plain
    inputs, outputs = weight.shape[-1], prod(weight.shape[:-1])
    scale = float(DTYPES[store.scale])
    code = float(DTYPES[store.type])
    extra = code if not store.symmetric else 0.0  # a zero point is stored as a code
    if store.per == "tensor":
        return code + (scale + extra) / (inputs * outputs)
    group = _group(weight, recipe, parts)
    if group is not None:
        share = group if store.per == "group" else group * group
        return code + (scale + extra) / share
    if store.per in ("group", "square") and store.otherwise == "keep":
        return plain
    return code + (scale + extra) / inputs


def _low(weight: Weight, recipe: Recipe) -> bool:
    """Whether a recipe stores a weight in low bits."""
    excluded = any(matches(weight.name, item.linears) for item in recipe.exclude)
    kept = weight.active < 1.0 and experts_kept(recipe) is not None
    return recipe.weights is not None and weight.multiplied and not excluded and not kept


def _group(weight: Weight, recipe: Recipe, parts: int) -> int | None:
    """How many inputs share a scale in so many parts of them, None where all of an output or of a weight do."""
    if recipe.weights is None or recipe.weights.per not in ("group", "square"):
        return None
    inputs = weight.shape[-1]
    return next((gcd(size, inputs // parts) for size in recipe.weights.group if inputs % size == 0), None)


def cuts_groups(built: Graph, recipe: Recipe, shares: Mapping[str, Share]) -> bool:
    """Whether groups of a rank's part of a weight would be smaller than any kernel reads."""
    groups = (
        _group(weight, recipe, shares.get(weight.name, WHOLE).parts)
        for weight in weights_in(built)
        if _low(weight, recipe)
    )
    return any(group is not None and group < LEAST for group in groups)


@dataclass(frozen=True)
class Sizes:
    """Of a model in a precision: bytes of its weights and of a token in the KV cache, bits of a weight on average."""

    weight_bytes: float
    kv_bytes_per_token: float
    bits_per_weight: float
    load: Load


def sizes_of(
    built: Graph, served: Graph, recipe: Recipe, base: str, shares: Mapping[str, Share] = MappingProxyType({})
) -> Sizes:
    """Sizes from the plain graph (weights) and the one with a float32 cache (`served`; without one there is none).

    With the `shares` of a rank and its graph as `served`, those of the rank.
    """
    total = numbers = read = operations = 0.0
    for weight in weights_in(built):
        share = shares.get(weight.name, WHOLE)
        size = weight.numbers * bits(weight, recipe, base, share.parts) / 8
        total, numbers = total + size * share.stored, numbers + weight.numbers * share.stored
        if weight.multiplied:
            read += size * weight.active * share.read
            operations += 2.0 * weight.numbers * weight.active * share.read
    numbers_cached = cache_bytes_per_token(served) / 4
    coded = numbers_cached + HEAD * cache_rows_per_token(served)
    kv = numbers_cached * BASE_BYTES[base] if recipe.kv_cache is None else coded
    arithmetic = base if recipe.compute == "base" else recipe.compute
    return Sizes(total, kv, 8 * total / numbers, Load(total, read, kv, operations, arithmetic))
