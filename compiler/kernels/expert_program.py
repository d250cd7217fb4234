"""A mixture's experts as launches: sort the rows by expert, a product for each group of matrices, the weighted sum.

`expert_equations` finds what belongs together in a graph; `expert_program` writes the launches of such a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from compiler.ir.core import Equation, Graph, Value
from compiler.kernels.attention import Launch, power
from compiler.kernels.expert_source import Group, Tile, grouped, tile_of
from compiler.kernels.row_source import ELEMENTWISE, RefusedError, aliases
from compiler.kernels.rows import BYTES, Call, Program

PRODUCT = "gather_matmul"
CHUNK = 1024  # choices that a program of the sort looks at together
ALL = 1 << 30  # rows in one row of a grid: the grid has one


def expert_equations(equations: Sequence[Equation]) -> dict[str, str]:
    """The owner of each equation's result that belongs to experts: the choice that its products share.

    With the products go what lies between them, their biases, the weighted sum behind them, and views that only they
    read.
    """
    made = {value.name: equation for equation in equations for value in equation.results}
    readers: dict[str, list[Equation]] = {}
    for equation in equations:
        for value in equation.values:
            readers.setdefault(value.name, []).append(equation)
    owner: dict[str, str] = {}
    for choice in {equation.values[2].name for equation in equations if equation.op == PRODUCT}:
        products = [eq for eq in equations if eq.op == PRODUCT and eq.values[2].name == choice]
        if not all(_stored(made, eq.values[1].name) for eq in products):
            continue  # of matrices that are not stored as the product takes them
        below = _closure(products, lambda eq: [user for value in eq.results for user in readers.get(value.name, ())])
        above = _closure(products, lambda eq: [made[value.name] for value in eq.values if value.name in made])
        inside = below & above
        summed = False
        for equation in equations:
            last = equation.values[-1] if equation.values else None
            if summed or last is None or equation.results[0].name in inside:
                continue
            bias = equation.op == "add" and equation.values[0].name in inside and _by(made.get(last.name), choice)
            summed = equation.op == "matmul" and last.name in inside
            inside |= {equation.results[0].name} if bias or summed else set()
        for equation in reversed(equations):
            users = readers.get(equation.results[0].name, ())
            view = equation.op == "reshape" or _by(equation, choice)
            if view and users and all(user.results[0].name in inside for user in users):
                inside.add(equation.results[0].name)
        owner |= dict.fromkeys(inside, choice)
    return owner


def _stored(made: Mapping[str, Equation], name: str) -> bool:
    """Whether matrices are weights, or made of codes that are: what is defined elsewhere is one."""
    equation = made.get(name)
    if equation is not None and equation.op == "dequantize":
        return all(_stored(made, value.name) for value in equation.values)
    return equation is None or equation.op == "weight"


def _by(equation: Equation | None, choice: str) -> bool:
    """Whether an equation looks up rows by the choice: the biases of the chosen."""
    return equation is not None and equation.op == "gather" and equation.values[1].name == choice


def _closure(start: Iterable[Equation], step: Callable[[Equation], list[Equation]]) -> set[str]:
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        equation = waiting.pop()
        if equation.results[0].name not in found:
            found.add(equation.results[0].name)
            waiting += step(equation)
    return found


def expert_program(graph: Graph, rows: int, architecture: int = 90) -> Program:
    """The launches of a part that `expert_equations` found, for at most `rows` rows on a GPU (90 is sm_90).

    Raises RefusedError where it has something else.
    """
    return _Maker(graph, rows, architecture).run()


@dataclass
class _Part:
    """A group in the making."""

    x: str
    products: list[Equation] = field(default_factory=list)
    biases: list[Equation] = field(default_factory=list)
    following: list[Equation] = field(default_factory=list)


class _Maker:
    def __init__(self, graph: Graph, rows: int, architecture: int) -> None:
        self.graph, self.rows, self.architecture = graph, rows, architecture
        self.low = {equation.result.name: equation for equation in graph.equations if equation.op == "dequantize"}
        self.alias = aliases(graph.equations)
        self.inputs = {value.name for value in graph.inputs}
        self.outputs = {self.home(value): port for port, value in graph.outputs}
        self.done = Program()

    def home(self, value: Value) -> str:
        return self.alias.get(value.name, value.name)

    def run(self) -> Program:
        parts, sums = self.parts()
        if not parts:
            raise RefusedError("no experts")
        first = parts[0].products[0]
        chosen, (experts, _, _) = first.values[2], first.values[1].type.static_shape()
        dims = chosen.type.shape[:-1]
        if len(dims) != 1 or not isinstance(dims[0], str):
            raise RefusedError(f"choices of {chosen.type.shape}")
        self.dim, self.each = dims[0], int(chosen.type.shape[-1])
        self.sort(chosen, experts, tile_of(self.rows, first.values[0].type.dtype, 1))
        for number, part in enumerate(parts):
            self.product(part, [equation for later in parts[number + 1 :] for equation in later.products] + sums)
        for equation in sums:
            self.combine(equation)
        written = {place for call in self.done.calls for place in call.places.values()}
        if missing := set(self.outputs.values()) - written:
            raise RefusedError(f"output `{min(missing)}` is not written")
        return self.done

    def parts(self) -> tuple[list[_Part], list[Equation]]:
        """Products on one input with what follows them, in order, and the weighted sums."""
        parts: list[_Part] = []
        sums: list[Equation] = []
        for equation in self.graph.equations:
            if equation.results[0].name in self.alias or equation.results[0].name in self.low:
                continue
            if equation.op == PRODUCT:
                x = self.home(equation.values[0])
                if not parts or parts[-1].x != x:
                    parts.append(_Part(x))
                parts[-1].products.append(equation)
            elif equation.op == "matmul":
                sums.append(equation)
            elif not parts or sums or equation.op not in (*ELEMENTWISE, "gather"):
                raise RefusedError(f"`{equation.op}` beside experts")
            else:
                (parts[-1].biases if equation.op == "gather" else parts[-1].following).append(equation)
        return parts, sums

    def place(self, value: Value) -> str:
        """Where a value lies: a port, or memory of the program's own."""
        name = self.home(value)
        if name in self.inputs:
            return name
        return self.outputs[name] if name in self.outputs else self.temp(name, self.columns(value), value.type.dtype)

    def temp(self, name: str, columns: int, dtype: str) -> str:
        self.done.temps[f"temp:{name}"] = columns * BYTES[dtype]
        return f"temp:{name}"

    def columns(self, value: Value) -> int:
        count = 1
        for size in value.type.shape[1:]:
            count *= int(size)
        return count

    def call(self, launch: Launch, places: dict[str, str], blocks: int = 1, tile: int = 1, depth: int = 1) -> None:
        self.done.calls.append(Call(launch, (self.dim,), blocks, tile, places, depth))

    def sort(self, chosen: Value, experts: int, tile: Tile) -> None:
        """Tiles are at most as many as choices: each of these may be alone in its own."""
        arguments = (*((name, "i32") for name in ("chosen", "slots", "owners", "total")), ("count", "int"))
        constants = {"experts": experts, "each": self.each, "rows": tile.rows, "bins": power(experts, 32),
                     "chunk": CHUNK}  # fmt: skip
        places = {
            "chosen": self.place(chosen), "slots": self.temp("slots", self.each * tile.rows, "i32"),
            "owners": self.temp("owners", self.each, "i32"), "total": self.temp("total", 1, "i32"),
        }  # fmt: skip
        self.call(Launch("order", "experts.order", arguments, constants, 4, 2), places, experts, ALL)

    def product(self, part: _Part, readers: Sequence[Equation]) -> None:
        read = {self.home(value) for equation in readers for value in equation.values}
        made = [equation.result for equation in (*part.products, *part.following)]
        stored = [value for value in made if self.home(value) in read | set(self.outputs)]
        x, weight, _ = part.products[0].values
        tile = tile_of(self.rows, x.type.dtype, len(part.products))  # of as many rows, whatever the products
        matrices = [self.low.get(eq.values[1].name) for eq in part.products]
        held = [value for eq, low in zip(part.products, matrices, strict=True)
                for value in ((eq.values[1],) if low is None else low.values)]  # fmt: skip
        values = [x, *held, *(eq.values[0] for eq in part.biases), *stored]
        shared = self.each if x.type.shape[-2] == 1 else 1
        group = Group(part.products, matrices, part.biases, part.following, stored, shared, self.architecture)
        launch, places = grouped(group, {value.name: self.place(value) for value in values}, tile)
        self.call(launch, places, -(-int(weight.type.shape[1]) // tile.outs), tile.each, self.each)

    def combine(self, equation: Equation) -> None:
        """weights [rows, 1, K] times results [rows, K, outs]."""
        weights, results = equation.values
        outs = int(results.type.shape[-1])
        if self.columns(weights) != self.each or self.columns(results) != self.each * outs:
            raise RefusedError("a product of two activations that is no weighted sum of experts")
        arguments = (("weights", weights.type.dtype), ("results", results.type.dtype),
                     ("y", equation.result.type.dtype))  # fmt: skip
        constants = {"each": self.each, "outs": outs, "span": power(outs)}
        places = {"weights": self.place(weights), "results": self.place(results), "y": self.place(equation.result)}
        self.call(Launch("combine", "experts.combine", arguments, constants, 4, 2), places)
