"""A rank's part of what it can compute without the others: weights, constants, and what is made of them row by row.

Parts of weights are slices, which are stored computed: codes and scales stay those of the whole weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from math import gcd

from compiler.ir.core import Arg, AttrValue, Equation, Value
from compiler.ir.types import TensorType
from compiler.passes.rewrite import Names, emit

# Each element of a result is made of those at its place, dims of 1 repeated.
ELEMENTWISE = frozenset({
    "add", "sub", "mul", "div", "maximum", "minimum", "compare", "and", "or", "where", "exp", "rsqrt", "cos", "sin",
    "tanh", "erf", "sigmoid", "relu", "silu", "gelu", "cast", "quantize", "dequantize",
})  # fmt: skip

LEAST = 16  # elements that share a scale: no format has fewer, no kernel reads fewer


class Parts:
    """Makes parts of values; `held` gives what a rank has of a value that is whole, None for others."""

    def __init__(
        self,
        made: Mapping[str, Equation],
        names: Names,
        rank: int,
        ranks: int,
        held: Callable[[Value], Value | None],
    ) -> None:
        self.made, self.names, self.rank, self.ranks, self.held = made, names, rank, ranks, held
        self.out: list[Equation] = []  # of the block in which parts are made
        self.known: MutableMapping[tuple[str, int, int], Value] = {}

    def of(self, value: Value, axis: int, parts: int) -> Value | str:
        """The rank's part of a value in so many along an axis, or why it can't make it alone."""
        key = value.name, axis, parts
        if key not in self.known:
            found = self._of(value, axis, parts)
            if isinstance(found, str):
                return found
            self.known[key] = found
        return self.known[key]

    def bounds(self, size: int, parts: int) -> tuple[int, int]:
        """Where the rank's part of so many elements begins and ends."""
        first = self.rank * parts // self.ranks
        return first * size // parts, (first + 1) * size // parts

    def _of(self, value: Value, axis: int, parts: int) -> Value | str:
        equation, size = self.made.get(value.name), value.type.shape[axis]
        if equation is None:
            return f"%{value.name} is not decided by weights"
        if not isinstance(size, int) or size % parts:
            return f"{size} of %{value.name} are no multiple of {parts}"
        if equation.op == "weight":
            return self._slice(value, axis, *self.bounds(size, parts))
        if equation.op == "const":
            return self._const(equation, axis, size // parts)
        if equation.op == "dequantize" and equation.attr.get("block"):
            return self._blocks(equation, axis, parts)
        if equation.op == "gather":
            return self._rows(equation, axis, parts)
        if equation.op in ELEMENTWISE:
            return self._element_by_element(equation, axis, parts)
        return f"%{value.name} is not decided by weights"

    def _emit(self, like: Equation, op: str, *args: Arg, attrs: Mapping[str, AttrValue], **kind: TensorType) -> Value:
        return emit(
            self.out, self.names, op, *args, to=f"{like.result.name}.part", where=like.where, attrs=attrs, **kind
        )

    def _slice(self, value: Value, axis: int, start: int, stop: int) -> Value | str:
        whole = self.held(value)
        if whole is None:
            return f"%{value.name} is not whole"
        return self._emit(self.made[value.name], "slice", whole, attrs={"axis": axis, "start": start, "stop": stop})

    def _const(self, equation: Equation, axis: int, part: int) -> Value | str:
        """The same of all ranks: it stands in a segment, which they share."""
        shape = equation.result.type.static_shape()
        depth = len(shape) + axis
        own = {_cut(equation.attr["value"], depth, start, start + part) for start in range(0, shape[axis], part)}
        if len(own) > 1:
            return f"numbers of %{equation.result.name} would differ by GPU"
        kept = (*shape[:depth], part, *shape[depth + 1 :])
        kind = TensorType(equation.result.type.dtype, kept)
        return self._emit(equation, "const", attrs={"value": own.pop()}, kind=kind)

    def _blocks(self, equation: Equation, axis: int, parts: int) -> Value | str:
        """Codes and their scales. Blocks that two ranks would share become smaller ones of the same scale."""
        block = equation.attr["block"]
        assert isinstance(block, tuple)
        size, of = int(str(block[axis])) if -axis <= len(block) else 1, int(str(equation.result.type.shape[axis]))
        smaller = gcd(size, of // parts)
        if smaller == size:
            return self._element_by_element(equation, axis, parts)
        if smaller < LEAST:
            return f"{of} in {parts} parts cut a block of {size} that shares a scale"
        codes, *rest = equation.values
        values: list[Value | str | None] = [self.of(codes, axis, parts)]
        for value in rest:
            held = self.held(value)
            if held is not None and along(value, axis):
                held = self._repeated(equation, held, axis, size // smaller)
                first, stop = self.bounds(of // smaller, parts)
                held = self._emit(equation, "slice", held, attrs={"axis": axis, "start": first, "stop": stop})
            values.append(held)
        blocks = [int(str(item)) for item in block]
        blocks[axis] = smaller
        return self._apply(equation, values, {**equation.attr, "block": tuple(blocks)})

    def _repeated(self, like: Equation, value: Value, axis: int, times: int) -> Value:
        """Each element along an axis several times, one behind the other."""
        shape = value.type.static_shape()
        place = len(shape) + axis
        column = (*shape[: place + 1], 1, *shape[place + 1 :])
        own = self._emit(like, "reshape", value, attrs={"shape": column})
        wide = self._emit(like, "concat", *[own] * times, attrs={"axis": axis})
        tall = (*shape[:place], shape[place] * times, *shape[place + 1 :])
        return self._emit(like, "reshape", wide, attrs={"shape": tall})

    def _rows(self, equation: Equation, axis: int, parts: int) -> Value | str:
        table, index = equation.values
        dims = equation.attr.get("dims", 1)
        assert isinstance(dims, int)
        if -axis > table.type.rank - dims:
            return f"rows of %{table.name} are looked up"
        return self._apply(equation, [self.of(table, axis, parts), self.held(index)])

    def _element_by_element(self, equation: Equation, axis: int, parts: int) -> Value | str:
        of = (self.of(value, axis, parts) if along(value, axis) else self.held(value) for value in equation.values)
        return self._apply(equation, list(of))

    def _apply(
        self, equation: Equation, values: list[Value | str | None], attrs: Mapping[str, AttrValue] | None = None
    ) -> Value | str:
        for value, found in zip(equation.values, values, strict=True):
            if not isinstance(found, Value):
                return found or f"%{value.name} is not whole"
        ready = iter(values)
        args = tuple(next(ready) if isinstance(arg, Value) else arg for arg in equation.args)
        given = equation.attr if attrs is None else attrs
        return self._emit(equation, equation.op, *args, attrs=given)  # type: ignore[arg-type]


def along(value: Value, axis: int) -> bool:
    """Whether a value has more than one element along an axis, so that one rank's part is not all of it."""
    return -axis <= value.type.rank and value.type.shape[axis] != 1


def _cut(value: AttrValue, depth: int, start: int, stop: int) -> AttrValue:
    assert isinstance(value, tuple)
    return value[start:stop] if depth == 0 else tuple(_cut(item, depth - 1, start, stop) for item in value)
