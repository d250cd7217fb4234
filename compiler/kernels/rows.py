"""A segment as kernels for few rows: products that read each weight once, and what is between them by rows.

An engine built for many tokens leaves bandwidth unused at few (docs/evidence/gpu); the runtime measures both, and takes
the faster for each size of batch. What a segment has beyond this page's rules, it has from its engine alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from compiler.ir.core import Equation, Graph, Value
from compiler.kernels.attention import Launch
from compiler.kernels.row_source import RefusedError, RowSource, aliases

SIZES = {16: 16, 64: 64, 1024: 128}  # at most so many rows: rows in a product's tile
BYTES = {"f32": 4, "f16": 2, "bf16": 2, "i32": 4}


@dataclass(frozen=True)
class Call:
    """One launch; `places` by argument; `rows` names the dim that counts rows: a block for each, or `blocks` a tile.

    `depth` is the third axis of the grid.
    """

    launch: Launch
    rows: str
    blocks: int
    tile: int
    places: Mapping[str, str]
    depth: int = 1


@dataclass
class Program:
    """Launches in order; places are ports of the segment or `temp:NAME`, whose bytes are in `temps`."""

    calls: list[Call] = field(default_factory=list)
    temps: dict[str, int] = field(default_factory=dict)


def program_of(graph: Graph, rows: int) -> Program:
    """A segment's kernels for at most `rows` rows, one of SIZES. Raises RefusedError where it has something else."""
    if any(equation.op == "gather_matmul" for equation in graph.equations):
        from compiler.kernels.expert_program import expert_program

        return expert_program(graph, rows)
    return _Maker(graph, rows).run()


def gemm(outs: int, ins: int, rows: int, dtype: str, out: str, bias: bool, residual: bool) -> Launch:
    """The product for few rows; tiles as measured on an H200 (docs/evidence/gpu/kernels-h200.json)."""
    tile, depth, stages = (64, 64, 6) if rows > 16 and outs > 8192 else (32, 128, 6 if rows <= 64 else 4)
    arguments = (
        ("x", dtype), ("w", dtype), ("bias", dtype if bias else ""), ("residual", dtype if residual else ""),
        ("y", out), ("count", "int"),
    )  # fmt: skip
    constants = {"outs": outs, "ins": ins, "x_row": ins, "rows": rows, "tile": tile, "depth": depth}
    return Launch("gemm", "gemm.gemm", arguments, constants, 4, stages)


class _Maker:
    def __init__(self, graph: Graph, rows: int) -> None:
        self.graph, self.rows = graph, rows
        self.alias = aliases(graph.equations)
        self.inputs = {value.name: value for value in graph.inputs}
        self.outputs = {self.alias.get(value.name, value.name): port for port, value in graph.outputs}
        self.made = {value.name: value for equation in graph.equations for value in equation.results}
        self.users: dict[str, list[int]] = {}
        for index, equation in enumerate(graph.equations):
            for value in equation.values:
                self.users.setdefault(self.home(value), []).append(index)
        self.done = Program()
        self.stored: set[str] = set(self.inputs)
        self.slices: dict[str, tuple[Value, int]] = {}

    def run(self) -> Program:
        if any(self.alias.get(value.name, value.name) in self.inputs for _, value in self.graph.outputs):
            raise RefusedError("an input is passed on as an output")
        equations = self.graph.equations
        index = 0
        while index < len(equations):
            equation = equations[index]
            if equation.op == "reshape" and equation.result.name in self.alias:
                index += 1
            elif equation.op == "matmul":
                index += self.product(index)
            else:
                index += self.row_group(index)
        missing = [port for value, port in self.outputs.items() if value not in self.stored]
        if missing:
            raise RefusedError(f"output `{missing[0]}` is not written")
        return self.done

    def home(self, value: Value) -> str:
        return self.alias.get(value.name, value.name)

    def place(self, value: Value) -> str:
        """Where a value lies: a port, or memory of the program's own."""
        name = self.home(value)
        if name in self.inputs:
            return name
        if name in self.outputs:
            return self.outputs[name]
        self.done.temps.setdefault(f"temp:{name}", self.rows * self.columns(value) * BYTES[value.type.dtype])
        return f"temp:{name}"

    def columns(self, value: Value) -> int:
        sizes = value.type.shape[1:] if isinstance(value.type.shape[0], str) else value.type.shape
        if not all(isinstance(size, int) for size in sizes):
            raise RefusedError(f"%{value.name} has rows of {sizes}")
        return prod(int(size) for size in sizes)

    def row_dim(self, value: Value) -> str:
        dim = value.type.shape[0]
        if not isinstance(dim, str):
            raise RefusedError(f"%{value.name} has no rows")
        return dim

    def is_weight(self, value: Value) -> bool:
        return value.name in self.inputs and all(isinstance(size, int) for size in value.type.shape)

    def product(self, index: int) -> int:
        """A matmul, with the sums and the cast that follow; gives how many equations it took."""
        equation = self.graph.equations[index]
        x, w = equation.args
        if not (
            isinstance(x, Value) and isinstance(w, Value) and self.is_weight(w) and equation.attr.get("transpose_b")
        ):
            raise RefusedError("a product of two activations, or of a weight that is not [out, in]")
        if x.type.dtype not in ("f16", "bf16") or x.type.dtype != w.type.dtype or len(w.type.shape) != 2:
            raise RefusedError(f"a product of {x.type.dtype} and {w.type.dtype}")
        if self.home(x) not in self.stored:
            raise RefusedError(f"%{x.name} is part of another value")
        outs, ins = (int(size) for size in w.type.shape)
        if self.columns(x) != ins:
            raise RefusedError(f"%{x.name} has rows of {self.columns(x)}, the weight takes {ins}")
        result, taken = equation.result, 1
        bias = residual = None
        while index + taken < len(self.graph.equations) and self.users.get(result.name) == [index + taken]:
            after = self.graph.equations[index + taken]
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
        launch = gemm(
            outs, ins, SIZES[self.rows], x.type.dtype, result.type.dtype, bias is not None, residual is not None
        )  # fmt: skip
        places = {"x": self.place(x), "w": w.name, "y": self.place(result)}
        places |= {"bias": bias.name} if bias is not None else {}
        places |= {"residual": self.place(residual)} if residual is not None else {}
        blocks = -(-outs // launch.constants["tile"])
        self.done.calls.append(Call(launch, self.row_dim(result), blocks, SIZES[self.rows], places))
        self.stored.add(self.home(result))
        return taken

    def row_group(self, first: int) -> int:
        """Equations up to the next product or change of rows, as one kernel."""
        equations = self.graph.equations
        stop = first
        rows = self.row_dim(equations[first].result)
        group: list[Equation] = []
        while stop < len(equations) and equations[stop].op != "matmul":
            equation = equations[stop]
            if not (equation.op == "reshape" and equation.result.name in self.alias):
                if self.row_dim(equation.result) != rows:
                    break
                group.append(equation)
            stop += 1
        source = RowSource(self.columns)
        for equation in group:
            if equation.op == "slice":
                self.cut(source, equation)
            elif equation.op == "gather":
                table, index = equation.args
                if not isinstance(table, Value) or not isinstance(index, Value) or self.home(table) not in self.stored:
                    raise RefusedError("rows are taken of what is not stored")
                row = source.index(self.place(index))
                columns = self.columns(equation.result)
                source.load(equation.result, self.place(table), row, columns, 0, columns)
            else:
                for value in equation.values:
                    self.bring(source, value)
                source.equation(equation)
        inside = set(range(first, stop))
        for equation in group:
            name = equation.result.name
            if equation.op != "slice" and (name in self.outputs or set(self.users.get(name, ())) - inside):
                source.store(equation.result, self.place(equation.result))
                self.stored.add(name)
        launch = source.launch()
        places = {argument: place for place, (argument, _) in source.pointers.items()}
        self.done.calls.append(Call(launch, rows, 1, 1, places))
        return stop - first

    def cut(self, source: RowSource, equation: Equation) -> None:
        (whole,) = equation.values
        if len(whole.type.shape) != 2 or equation.attr["axis"] not in (-1, 1) or self.home(whole) not in self.stored:
            raise RefusedError("a slice of what is not stored in rows")
        start, stop = int(str(equation.attr["start"])), int(str(equation.attr["stop"]))
        source.load(equation.result, self.place(whole), "row", self.columns(whole), start, stop - start)

    def bring(self, source: RowSource, value: Value) -> None:
        """Load a value that an earlier launch stored, or a weight's one row."""
        if value.name in source.names:
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
                "rows": call.rows,
                "blocks": call.blocks,
                "tile": call.tile,
                "depth": call.depth,
                "places": dict(call.places),
            }
            for call in program.calls
        ],
    }
