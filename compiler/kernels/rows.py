"""A segment as kernels: products that read each weight once, and what is between them by rows.

An engine built for many tokens leaves bandwidth unused at few (docs/evidence/gpu); the runtime measures both, and takes
the faster for each size of batch. Low-bit products that the toolchain has no layer for have this way only: the kernel
of rows that makes an input rounds it and stores codes and scales, the product reads codes on both sides. What a segment
has beyond this page's rules, it has from its engine alone; without engines it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from compiler.ir.core import Equation, Graph, Value
from compiler.kernels.attention import Launch
from compiler.kernels.attention_rows import views, within
from compiler.kernels.head_source import HeadSource, of_heads, ones_of
from compiler.kernels.products import MANY, Product, group_of, joined, multiplies, product
from compiler.kernels.row_source import RefusedError, RowSource, aliases, rows_of

SIZES = (1, 16, 32, 64, 128, 256, 512, 1024, MANY)  # at most so many rows; the last takes more too
APART = ("matmul", "attention")  # a kernel of their own
BYTES = {"f32": 4, "f16": 2, "bf16": 2, "i32": 4, "i8": 1, "f8e4m3": 1, "f8e8m0": 1}


@dataclass(frozen=True)
class Call:
    """One launch; `places` by argument; `rows` names the dims that count rows: a block for each, or `blocks` a tile.

    `depth` is the third axis of the grid.
    """

    launch: Launch
    rows: tuple[str, ...]
    blocks: int
    tile: int
    places: Mapping[str, str]
    depth: int = 1


@dataclass
class Program:
    """Launches in order; places are ports of the segment or `temp:NAME`, whose bytes in a row are in `temps`."""

    calls: list[Call] = field(default_factory=list)
    temps: dict[str, int] = field(default_factory=dict)


def program_of(graph: Graph, rows: int, architecture: int) -> Program:
    """A segment's kernels for at most `rows` rows, one of SIZES, on a GPU (90 is sm_90).

    Raises RefusedError where it has something else.
    """
    if any(equation.op == "gather_matmul" for equation in graph.equations):
        from compiler.kernels.expert_program import expert_program

        return expert_program(graph, rows, architecture)
    return _Maker(graph, rows, architecture).run()


class _Maker:
    def __init__(self, graph: Graph, rows: int, architecture: int) -> None:
        self.graph, self.rows, self.architecture = graph, rows, architecture
        self.alias = aliases(graph.equations)
        self.inputs = {value.name: value for value in graph.inputs}
        self.outputs = {self.alias.get(value.name, value.name): port for port, value in graph.outputs}
        # no launch of its own: who reads it reads codes and scale
        self.low = {equation.result.name: equation for equation in graph.equations if equation.op == "dequantize"}
        for name in [name for name in self.low if not self.read_as_codes(name)]:
            del self.low[name]
        self.consts = {equation.result.name: equation for equation in graph.equations if equation.op == "const"}
        self.views = views(graph, self.alias)  # no launch either: attention reads columns where they lie
        self.ones = ones_of(graph.equations)
        elsewhere = {*self.low, *self.alias, *self.consts, *self.views, *self.ones}
        self.equations = [equation for equation in graph.equations if equation.results[0].name not in elsewhere]
        self.users: dict[str, list[int]] = {}
        for index, equation in enumerate(self.equations):
            for value in equation.values:
                for read in self.parts(value):
                    self.users.setdefault(self.home(read), []).append(index)
        self.done = Program()
        self.stored: set[str] = set(self.inputs)

    def run(self) -> Program:
        if any(self.alias.get(value.name, value.name) in self.inputs for _, value in self.graph.outputs):
            raise RefusedError("an input is passed on as an output")
        index = 0
        while index < len(self.equations):
            step = {"matmul": self.product, "attention": self.attention}.get(self.equations[index].op, self.row_group)
            index += step(index)
        missing = [port for value, port in self.outputs.items() if value not in self.stored]
        if missing:
            raise RefusedError(f"output `{missing[0]}` is not written")
        return self.done

    def read_as_codes(self, name: str) -> bool:
        """Whether products multiply the codes of a dequantized value; else an input is rounded and widened again."""
        codes = self.low[name].values[0]
        readers = [equation for equation in self.graph.equations if name in {value.name for value in equation.values}]
        if self.is_weight(codes) or not readers:
            return self.is_weight(codes)
        weights = [self.low.get(eq.values[1].name) if eq.op == "matmul" else None for eq in readers]
        return all(
            weight is not None and multiplies(codes.type.dtype, weight.values[0].type.dtype, self.architecture)
            for weight in weights
        )

    def parts(self, value: Value) -> tuple[Value, ...]:
        """What is read where a value is: codes and scale of one that was rounded, all columns of some for attention."""
        found = self.views.get(self.home(value)) or self.low.get(value.name)
        return (value,) if found is None else found.values

    def home(self, value: Value) -> str:
        return self.alias.get(value.name, value.name)

    def place(self, value: Value) -> str:
        """Where a value lies: a port, or memory of the program's own."""
        name = self.home(value)
        if name in self.inputs:
            return name
        if name in self.outputs:
            return self.outputs[name]
        if value.type.dtype not in BYTES:
            raise RefusedError(f"rows of {value.type.dtype} to be stored")
        self.done.temps.setdefault(f"temp:{name}", self.columns(value) * BYTES[value.type.dtype])
        return f"temp:{name}"

    def columns(self, value: Value) -> int:
        sizes = value.type.shape[len(rows_of(value)) :]
        if not all(isinstance(size, int) for size in sizes):
            raise RefusedError(f"%{value.name} has rows of {sizes}")
        return prod(int(size) for size in sizes)

    def row_dims(self, value: Value) -> tuple[str, ...]:
        if not rows_of(value):
            raise RefusedError(f"%{value.name} has no rows")
        return rows_of(value)

    def is_weight(self, value: Value) -> bool:
        return value.name in self.inputs and not rows_of(value)

    def product(self, index: int) -> int:
        """A matmul, with the sums and the cast that follow; gives how many equations it took."""
        equation = self.equations[index]
        x, w = equation.values
        codes = self.parts(w)[0]
        if not self.is_weight(codes) or len(w.type.shape) != 2 or not equation.attr.get("transpose_b"):
            raise RefusedError("a product of two activations, or of a weight that is not [out, in]")
        narrow, *x_scale = self.parts(x)
        if any(self.home(value) not in self.stored for value in (narrow, *x_scale)):
            raise RefusedError(f"%{x.name} is part of another value")
        outs, ins = (int(size) for size in w.type.shape)
        if self.columns(x) != ins:
            raise RefusedError(f"%{x.name} has rows of {self.columns(x)}, the weight takes {ins}")
        result, taken, bias, residual = self.sums(index, outs)
        asked = Product(
            outs, ins, narrow.type.dtype, codes.type.dtype, result.type.dtype,
            bias="" if bias is None else bias.type.dtype, residual="" if residual is None else residual.type.dtype,
            **self.scales(x, w),
        )  # fmt: skip
        launch = product(asked, self.rows, self.architecture)
        places = {"x": self.place(narrow), "w": codes.name, "y": self.place(result)}
        low = self.low.get(w.name)
        stored = () if low is None else zip(("scale", "zero", "x_scale"), low.args[1:], strict=False)
        places |= {name: value.name for name, value in stored if isinstance(value, Value)}
        places |= {name: self.place(value) for name, value in zip(("x_scale",), x_scale, strict=False)}
        places |= {"bias": bias.name} if bias is not None else {}
        places |= {"residual": self.place(residual)} if residual is not None else {}
        splits = int(launch.constants.get("splits", 1))
        if splits > 1:
            sums = f"temp:{self.home(result)}.splits"
            self.done.temps[sums] = splits * outs * BYTES["f32"]
            self.call(launch, result, outs, places | {"y": sums}, splits)
            launch, places = joined(asked, splits), places | {"sums": sums}
        self.call(launch, result, outs, places)
        self.stored.add(self.home(result))
        return taken

    def call(self, launch: Launch, result: Value, outs: int, places: Mapping[str, str], splits: int = 1) -> None:
        blocks, tile = -(-outs // int(launch.constants["tile"])), int(launch.constants["rows"])
        self.done.calls.append(Call(launch, self.row_dims(result), blocks, tile, places, splits))

    def sums(self, index: int, outs: int) -> tuple[Value, int, Value | None, Value | None]:
        """The result of a product with what follows it, how many equations that is, and its bias and residual."""
        equations = self.equations
        result, taken = equations[index].result, 1
        bias = residual = None
        while index + taken < len(equations) and self.users.get(result.name) == [index + taken]:
            after = equations[index + taken]
            other = next((value for value in after.values if value.name != result.name), None)
            if result.name in self.outputs:
                break
            if after.op == "add" and other is not None and len(after.values) == 2:
                if self.is_weight(other) and other.type.shape == (outs,) and bias is None and residual is None:
                    bias = other
                elif residual is None and self.home(other) in self.stored and self.columns(other) == outs:
                    residual = other
                else:
                    break
            elif not (after.op == "cast" and after.attr["dtype"] == "f32" and after.result.type.dtype == "f32"):
                break
            result, taken = after.result, taken + 1
        return result, taken, bias, residual

    def scales(self, x: Value, w: Value) -> dict[str, Any]:
        """The fields of a Product for its scales; the outer scale of a weight is one of the whole product."""
        found = self.weight_scales(w) | self.input_scale(x)
        if w.name in self.low and len(self.low[w.name].args) > 3:
            if "x_scale" in found:
                raise RefusedError(f"%{w.name} has an outer scale, and %{x.name} a scale of its own")
            found["x_scale"] = "tensor"
        return found

    def weight_scales(self, w: Value) -> dict[str, Any]:
        """The fields of a Product for a weight of codes."""
        found = self.low.get(w.name)
        if found is None:
            return {}
        scale, block = found.values[1], found.attr.get("block")
        if not block and scale.type.shape != (w.type.shape[0], 1):
            raise RefusedError(f"%{w.name} has no scale for each row")
        if isinstance(block, tuple) and block[-2] != 1:
            raise RefusedError(f"%{w.name} has scales for blocks of {block[-2]} rows")
        return {
            "scale": scale.type.dtype,
            "group": group_of(found),
            "zero": len(found.args) > 2 and found.args[2] is not None,
        }

    def input_scale(self, x: Value) -> dict[str, Any]:
        """The fields of a Product for an input of codes."""
        found = self.low.get(x.name)
        if found is None:
            return {}
        scale, block = found.values[1], found.attr.get("block")
        if len(found.args) > 2:
            raise RefusedError(f"%{x.name} has a zero or two scales")
        if isinstance(block, tuple):
            return {"x_scale": "block", "x_block": int(str(block[-1])), "x_scale_type": scale.type.dtype}
        return {"x_scale": "row" if rows_of(scale) else "tensor", "x_scale_type": scale.type.dtype}

    def attention(self, index: int) -> int:
        """An attention of padded rows without a cache."""
        equation = self.equations[index]
        read: dict[str, tuple[str, int, int]] = {}
        for name, value in zip("qkv", equation.values, strict=False):
            (whole,) = self.parts(value)
            if self.home(whole) not in self.stored:
                raise RefusedError(f"%{value.name} is not stored")
            view = self.views.get(self.home(value))
            read[name] = (self.place(whole), self.columns(whole), 0 if view is None else int(str(view.attr["start"])))
        launch = within(equation, {name: (row, start) for name, (_, row, start) in read.items()})
        places = {name: place for name, (place, _, _) in read.items()}
        places |= {"positions": self.place(equation.values[3]), "out": self.place(equation.result)}
        heads, rows = int(launch.constants["heads"]), int(launch.constants["rows"])
        self.done.calls.append(Call(launch, self.row_dims(equation.result), heads, rows, places))
        self.stored.add(self.home(equation.result))
        return 1

    def row_group(self, first: int) -> int:
        """Equations up to the next product or change of rows, as one kernel."""
        stop, equations = first, self.equations
        rows = self.row_dims(equations[first].result)
        while (
            stop < len(equations) and equations[stop].op not in APART and self.row_dims(equations[stop].result) == rows
        ):
            stop += 1
        group = equations[first:stop]
        source = RowSource(self.columns)
        heads = HeadSource(source, lambda value: self.place(value) if self.home(value) in self.stored else None)
        for equation in group:
            if of_heads(equation, self.ones):
                heads.moved[equation.result.name] = equation
            elif equation.op == "slice":
                self.cut(source, equation)
            elif equation.op == "gather":
                table, index = equation.args
                if not isinstance(table, Value) or not isinstance(index, Value) or self.home(table) not in self.stored:
                    raise RefusedError("rows are taken of what is not stored")
                here = self.home(index) in source.names
                row = source.index_of(self.named(source, index)) if here else source.index(self.place(index))
                columns = self.columns(equation.result)
                source.load(equation.result, self.place(table), row, columns, 0, columns)
            else:
                for value in equation.values:
                    if value.name in heads.moved and value.name not in source.names:
                        heads.define(value)
                    self.bring(source, value)
                source.equation(equation)
        inside = set(range(first, stop))
        for equation in group:
            name = equation.result.name
            if name in self.outputs or set(self.users.get(name, ())) - inside:
                if name in heads.moved and name not in source.names:
                    heads.define(equation.result)
                source.store(equation.result, self.place(equation.result))
                self.stored.add(name)
        launch = source.launch()
        places = {argument: place for place, (argument, _) in source.pointers.items()}
        self.done.calls.append(Call(launch, rows, 1, 1, places, source.pieces))
        return stop - first

    def cut(self, source: RowSource, equation: Equation) -> None:
        (whole,) = equation.values
        outer, columns = rows_of(whole), self.columns(whole)
        first = (equation.attr["axis"], equation.attr["start"], equation.attr["stop"]) == (-2, 0, 1)
        if first and len(outer) == 2 and len(whole.type.shape) == 3 and self.home(whole) in self.stored:
            row = f"row * {source.size(outer[1])}"  # the first of so many
            source.load(equation.result, self.place(whole), row, columns, 0, columns)
            return
        plain = len(whole.type.shape) == len(rows_of(whole)) + 1 and equation.attr["axis"] == -1
        if not plain or self.home(whole) not in self.stored:
            raise RefusedError("a slice of what is not stored in rows")
        start, stop = int(str(equation.attr["start"])), int(str(equation.attr["stop"]))
        source.load(equation.result, self.place(whole), "row", columns, start, stop - start)

    def named(self, source: RowSource, value: Value) -> Value:
        """A value that is computed here, also by the name of a view of it."""
        source.names[value.name] = source.names[self.home(value)]
        return value

    def numbers(self, value: Value) -> list[float]:
        """Those of a constant row, or of one number."""
        found = self.consts[value.name].attr["value"]
        row = found if isinstance(found, tuple) else (found,)
        numbers = [float(number) for number in row if isinstance(number, (int, float))]
        if len(value.type.shape) > 1 or len(numbers) < len(row):
            raise RefusedError(f"constant %{value.name} is no row")
        return numbers

    def bring(self, source: RowSource, value: Value) -> None:
        """Load a value that an earlier launch stored, or a weight's one row."""
        if self.home(value) in source.names:
            self.named(source, value)
            return
        if value.name in self.consts:
            source.const(value, self.numbers(value))
            return
        if self.home(value) not in self.stored:
            raise RefusedError(f"%{value.name} is not stored")
        columns = self.columns(value)
        if self.is_weight(value):
            if len(value.type.shape) != 1:
                raise RefusedError(f"weight `{value.name}` is no row")
            source.load(value, value.name, "0", 0, 0, columns)
        else:
            source.load(value, self.place(value), "row", columns, 0, columns)


def as_dict(program: Program, key: Any) -> dict[str, Any]:
    """A program as kernels.json has it; `key` names the entry of a launch."""
    return {
        "temps": program.temps,
        "calls": [
            {
                "kernel": key(call.launch),
                "rows": list(call.rows),
                "blocks": call.blocks,
                "tile": call.tile,
                "depth": call.depth,
                "places": dict(call.places),
            }
            for call in program.calls
        ],
    }
