"""Rewrites the products that a plan names: codes and scales in place of a weight, rounding of the input before it.

    %w.codes, %w.scale [, %w.zero] [, %w.outer]: weights      %w = dequantize(codes, scale, ...)
    x by the order of the codes' columns where a checkpoint has groups of inputs that do not lie together
    x * smooth where the recipe smooths; folded into the norm that makes x if nothing else reads that
    x = dequantize(quantize(x, s), s) with s = row_scale(x) or, static, a weight

Rounds of a `repeat` that are quantized unlike each other become `repeat`s of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from compiler.ir.core import Arg, AttrValue, Block, Equation, Graph, Value, substitute, used_values
from compiler.ir.names import shift
from compiler.ir.types import TensorType
from compiler.passes.quantization_plan import (
    Experts,
    Linear,
    Override,
    QuantizationPlan,
    by_round,
    leaf_of,
    plan_quantization,
)
from compiler.passes.rewrite import Names, beside, emit
from compiler.passes.runner import Log, Pass
from specs.errors import Where
from specs.precision import Recipe

Attrs = Mapping[str, AttrValue]
_NONE: Attrs = {}
# Smallest scale of NVFP4's blocks: a block of zeros must not divide by zero.
LEAST_E4M3 = 2.0**-9


def quantize(
    recipe: Recipe,
    overrides: Sequence[Override] = (),
    planned: Callable[[QuantizationPlan], None] | None = None,
    stored: Mapping[str, Linear | str] | None = None,
    experts: Experts | None = None,
) -> Pass:
    """The pass that plans for the graph it gets, tells `planned`, and carries the plan out.

    `stored`: linears as the checkpoint has them, which take the place of the recipe's; `experts`: why those of experts
    stay as they are, by how they would be stored.
    """

    def apply(graph: Graph, log: Log) -> Graph:
        plan = plan_quantization(graph, recipe, overrides, stored, experts)
        if planned is not None:
            planned(plan)
        for name, why in plan.kept.items():
            log.refuse("quantize", name, None, why)
        return _Quantizer(graph, plan, log).run() if plan.linears else graph

    return Pass("quantize", apply)


class _Quantizer:
    def __init__(self, graph: Graph, plan: QuantizationPlan, log: Log) -> None:
        self.graph, self.plan, self.log = graph, plan, log
        self.names = Names(graph)

    def run(self) -> Graph:
        out: list[Equation] = []
        outputs = tuple(value for _, value in self.graph.outputs)
        top = {eq.result.name: str(eq.attr["name"]) for eq in self.graph.equations if eq.op == "weight"}
        for equation in self.graph.equations:
            out += self.split(equation) if equation.body is not None else [equation]
        chosen = {text: self.plan.linears[text] for text in top.values() if text in self.plan.linears}
        out = self.block(out, outputs, chosen)
        return self.graph.with_equations(tuple(out))

    def split(self, equation: Equation) -> list[Equation]:
        """A `repeat` as one or more, each of rounds that are quantized alike."""
        body, count = equation.body, equation.attr["count"]
        assert body is not None
        assert isinstance(count, int)
        inside = {eq.result.name: str(eq.attr["name"]) for eq in body.equations if eq.op == "weight"}
        rounds = by_round(self.plan, tuple(inside.values()), count)
        alike = [{text: (one.storage, one.recipe.name) for text, one in found.items()} for found in rounds]
        starts = [index for index in range(count) if index == 0 or alike[index] != alike[index - 1]]
        out, carried = [], equation.values
        for start, stop in zip(starts, [*starts[1:], count], strict=True):
            part = equation if len(starts) == 1 else self.part(equation, start, stop - start, carried, stop == count)
            carried = part.results
            assert part.body is not None
            chosen = {shift(text, start): linear for text, linear in rounds[start].items()}
            equations = self.block(list(part.body.equations), part.body.results, chosen)
            out.append(replace(part, body=replace(part.body, equations=tuple(equations))))
        return out

    def part(self, equation: Equation, start: int, count: int, carried: tuple[Value, ...], last: bool) -> Equation:
        """Rounds from `start` on: names of values are new, but for the results of the last part."""
        body = equation.body
        assert body is not None
        new: dict[str, Arg] = {}

        def renamed(value: Value) -> Value:
            found = Value(self.names.unique(beside(value.name, f"from{start}")), value.type)
            new[value.name] = found
            return found

        params = tuple(renamed(value) for value in body.params)
        equations = []
        for inner in body.equations:
            moved = substitute(inner, new)
            moved = replace(moved, results=tuple(renamed(value) for value in inner.results))
            if inner.op in ("weight", "state"):
                moved = replace(moved, attrs=(("name", shift(str(inner.attr["name"]), start)),))
            equations.append(moved)
        results = tuple(new.get(value.name, value) for value in body.results)
        values = tuple(value for value in results if isinstance(value, Value))
        outs = tuple(
            value if last else Value(self.names.unique(beside(value.name, f"to{start + count}")), value.type)
            for value in equation.results
        )
        return replace(
            equation,
            args=carried,
            results=outs,
            attrs=(("count", count),),
            body=Block(params, tuple(equations), values),
        )

    # -- one block ----------------------------------------------------------------------------------------------------

    def block(
        self,
        equations: list[Equation],
        results: Sequence[Value],
        chosen: Mapping[str, Linear],
    ) -> list[Equation]:
        """The block with the products of the chosen weights (by name template) rewritten."""
        named = {eq.result.name: str(eq.attr["name"]) for eq in equations if eq.op == "weight"}
        products: dict[str, list[tuple[Equation, str, Linear]]] = {}  # by the input that they share
        for equation in equations:
            weight = equation.args[1] if equation.op in ("matmul", "gather_matmul") else None
            name = named.get(weight.name) if isinstance(weight, Value) else None
            if name in chosen:
                x = equation.args[0]
                assert isinstance(x, Value)
                products.setdefault(x.name, []).append((equation, str(name), chosen[str(name)]))
        if not products:
            return equations
        return _Rewriting(self, equations, results, products).run()


class _Rewriting:
    """One block while its products change."""

    def __init__(
        self,
        parent: _Quantizer,
        equations: list[Equation],
        results: Sequence[Value],
        products: Mapping[str, list[tuple[Equation, str, Linear]]],
    ) -> None:
        self.parent, self.equations, self.products = parent, equations, products
        self.of_product = {item[0].result.name: item for items in products.values() for item in items}
        self.gone = {
            eq.args[1].name for items in products.values() for eq, _, _ in items if isinstance(eq.args[1], Value)
        }
        self.readers: dict[str, int] = {}
        for equation in equations:
            for name in {value.name for value in used_values(equation)}:
                self.readers[name] = self.readers.get(name, 0) + 1
        for value in results:
            self.readers[value.name] = self.readers.get(value.name, 0) + 1
        self.out: list[Equation] = []
        self.inputs: dict[tuple[str, str], Value] = {}
        self.where: Where | None = None

    def run(self) -> list[Equation]:
        for equation in self.equations:
            self.where = equation.where
            if equation.op == "weight" and equation.result.name in self.gone:
                continue
            if equation.results[0].name in self.of_product:
                self.product(*self.of_product[equation.results[0].name])
            elif self.smoothed_norm(equation) is None:
                self.out.append(equation)
        return self.out

    def emit(self, op: str, *args: Arg, to: str, kind: TensorType | None = None, attrs: Attrs = _NONE) -> Value:
        while args and args[-1] is None:
            args = args[:-1]
        return emit(self.out, self.parent.names, op, *args, to=to, where=self.where, kind=kind, attrs=attrs)

    def stored(self, name: str, dtype: str, *shape: int) -> Value:
        """A weight by the name of its template."""
        return self.emit("weight", to=leaf_of(name), kind=TensorType(dtype, shape), attrs={"name": name})

    # -- a product ----------------------------------------------------------------------------------------------------

    def product(self, equation: Equation, name: str, linear: Linear) -> None:
        x, weight, *chosen = equation.args
        assert isinstance(x, Value)
        assert isinstance(weight, Value)
        store = linear.storage
        codes = self.stored(f"{name}.codes", store.type, *store.shape)
        scale = self.stored(f"{name}.scale", store.scale, *store.scale_shape)
        zero = self.stored(f"{name}.zero", store.type, *store.scale_shape) if store.zero else None
        outer = self.stored(f"{name}.outer", "f32", 1) if store.outer else None
        attrs: dict[str, AttrValue] = {"dtype": weight.type.dtype, **({"block": store.block} if store.block else {})}
        wide = self.emit("dequantize", codes, scale, zero, outer, to=weight.name, attrs=attrs)
        rows = self.input(x, linear)
        if store.permuted:
            rows = self.permuted(rows, name)
        self.out.append(replace(equation, args=(rows, wide, *chosen)))
        self.parent.log.hit(linear.recipe.name, equation.result.name, equation.where)

    def permuted(self, x: Value, name: str) -> Value:
        """x with its last dim in the order in which the codes of a weight have theirs."""
        order = self.stored(f"{name}.order", "i32", int(str(x.type.shape[-1])))
        rank = x.type.rank
        first: dict[str, AttrValue] = {"axes": (-1, *range(-rank, -1))}
        back: dict[str, AttrValue] = {"axes": (*range(1 - rank, 0), -rank)}
        columns = self.emit("transpose", x, to=beside(x.name, "columns"), attrs=first)
        ordered = self.emit("gather", columns, order, to=beside(x.name, "ordered"))
        return self.emit("transpose", ordered, to=beside(x.name, "rows"), attrs=back)

    def input(self, x: Value, linear: Linear) -> Value:
        """The input of a product, smoothed and rounded as its recipe says, once for all products that share it."""
        recipe, items = linear.recipe, self.products[x.name]
        key = (x.name, recipe.name)
        if key not in self.inputs:
            if linear.smooth is not None and (x.name, "smooth") not in self.inputs:
                factors = self.stored(f"{items[0][1]}.smooth", x.type.dtype, int(str(x.type.shape[-1])))
                self.inputs[x.name, "smooth"] = self.emit("mul", x, factors, to=beside(x.name, "smooth"))
            smoothed = self.inputs[x.name, "smooth"] if linear.smooth is not None else x
            first = next(name for _, name, other in items if other.recipe.name == recipe.name)
            self.inputs[key] = self.rounded(smoothed, first, recipe)
        return self.inputs[key]

    def rounded(self, x: Value, first: str, recipe: Recipe) -> Value:
        how = recipe.activations
        if how is None:
            return x
        outer: Value | None = None
        block: dict[str, AttrValue] = {"block": (1, how.block)} if how.block is not None else {}
        row: dict[str, AttrValue] = {"dtype": how.type, **({"block": how.block} if how.block is not None else {})}
        if how.scale == "f8e4m3":  # blocks whose float32 scales are themselves rounded, by a scale from calibration
            outer = self.stored(f"{first}.input_outer", "f32", 1)
            exact = self.emit("row_scale", x, to=beside(x.name, "largest"), attrs=row)
            least = self.emit("mul", outer, LEAST_E4M3, to=beside(x.name, "least"))
            exact = self.emit("maximum", exact, least, to=beside(x.name, "largest"))
            scale = self.emit("quantize", exact, outer, to=beside(x.name, "scale"), attrs={"dtype": "f8e4m3"})
        elif how.mode == "static":
            scale = self.stored(f"{first}.input_scale", "f32", 1)
        else:
            kind: dict[str, AttrValue] = {"scale": how.scale} if how.scale != "f32" else {}
            scale = self.emit("row_scale", x, to=beside(x.name, "scale"), attrs={**row, **kind})
        attrs: dict[str, AttrValue] = {"dtype": how.type, **block}
        codes = self.emit("quantize", x, scale, None, outer, to=beside(x.name, how.type), attrs=attrs)
        attrs = {"dtype": x.type.dtype, **block}
        return self.emit("dequantize", codes, scale, None, outer, to=beside(x.name, "rounded"), attrs=attrs)

    def smoothed_norm(self, equation: Equation) -> Value | None:
        """A norm that only smoothed products read, with the factors in its gain: nothing is left to multiply by."""
        value = equation.results[0]
        items = self.products.get(value.name, ())
        if equation.op not in ("rms_norm", "layer_norm") or not items or len(items) != self.readers[value.name]:
            return None
        if any(linear.smooth is None for _, _, linear in items) or equation.args[1:] == ():
            return None
        gains = [arg for arg in equation.args[1:] if isinstance(arg, Value)]
        if len({gain.type for gain in gains}) != 1 or len(gains) != len(equation.args) - 1:
            return None
        factors = self.stored(f"{items[0][1]}.smooth", gains[0].type.dtype, int(str(value.type.shape[-1])))
        scaled = tuple(self.emit("mul", gain, factors, to=beside(gain.name, "smooth")) for gain in gains)
        self.out.append(replace(equation, args=(equation.args[0], *scaled)))
        self.inputs[value.name, "smooth"] = value
        return value
