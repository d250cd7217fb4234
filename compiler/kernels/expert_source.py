"""Writes the product of sorted rows with their experts' matrices, and what follows element by element, as one kernel.

A program takes tiles of rows of one expert, of whom there are as many as the router made; the weights of an expert that
nobody chose are never read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compiler.ir.core import Equation, Value
from compiler.kernels.attention import Launch
from compiler.kernels.expert_codes import codes_read, depth_of
from compiler.kernels.row_source import RefusedError, RowSource


@dataclass(frozen=True)
class Tile:
    """Rows of one expert and outs in a block, depth of a step along ins, warps, stages, and groups of programs."""

    rows: int
    outs: int
    depth: int
    warps: int
    stages: int
    each: int  # rows of the call that a row of the grid stands for


def tile_of(rows: int, dtype: str, products: int) -> Tile:
    """For at most `rows` rows in a call; each expert gets a fraction of them, so tiles stay low."""
    if dtype == "f32":
        return Tile(16, 32, 32, 4, 3, 4)
    if rows <= 64:
        return Tile(16, 64 // products, 128, 4, 4, 4)
    return Tile(64, 128 // products, 64, 4, 3, 64)


@dataclass(frozen=True)
class Group:
    """Products that share input and choice, the biases and elementwise equations behind, and what is stored."""

    products: Sequence[Equation]
    matrices: Sequence[Equation | None]  # the dequantize of each product's, None where they are numbers
    biases: Sequence[Equation]  # gather(table [E, O], chosen)
    following: Sequence[Equation]
    stored: Sequence[Value]
    shared: int  # pairs that read one row: K where all choices of a row do, else 1
    architecture: int = 90


class _Tiles(RowSource):
    """Equations on tiles [rows, outs] of one expert, as text."""

    def __init__(self) -> None:
        super().__init__(lambda _: 0)

    def define(self, value: Value, text: str) -> None:
        """A value that is not computed from others here."""
        self._define(value, text, rounded=True)


def grouped(group: Group, places: Mapping[str, str], tile: Tile) -> tuple[Launch, dict[str, str]]:
    """The kernel of a group and the place of each of its arguments; raises RefusedError for what has no rule."""
    x, weight, _ = group.products[0].values
    _, outs, ins = weight.type.static_shape()
    arguments = [("x", x.type.dtype), *((name, "i32") for name in ("slots", "owners", "total"))]
    where = {"x": places[x.name], **{name: f"temp:{name}" for name in ("slots", "owners", "total")}}

    def argument(name: str, value: Value, kind: str = "") -> str:
        arguments.append((name, kind or value.type.dtype))
        where[name] = places[value.name]
        return name

    depths = {depth_of(low, tile.depth) for low in group.matrices if low is not None} or {tile.depth}
    if len(depths) > 1:
        raise RefusedError("products of experts whose codes lie unlike each other")
    depth = depths.pop()
    # no masks where every tile is whole
    inside = [*(["(n < outs)[:, None]"] if outs % tile.outs else []), *(["at[None, :]"] if ins % depth else [])]
    mask = f", mask={' & '.join(inside)}, other=0.0" if inside else ""
    real = "real[:, None]" + (" & at[None, :]" if ins % depth else "")
    before, inner, source = list[str](), list[str](), _Tiles()
    for number, product in enumerate(group.products):
        if product.values[0].name != x.name or product.values[1].type != weight.type:
            raise RefusedError("products of experts on several inputs, or with matrices of several shapes")
        low = group.matrices[number]
        if low is not None:
            lines = codes_read(low, number, x.type.dtype, group.architecture, argument, inside)
            before += lines.before
            inner += lines.inner
            source.define(product.result, lines.result)
            continue
        w = argument(f"w{number}", product.values[1])
        before.append(f"acc{number} = tl.zeros([rows, tile], tl.float32)")
        before.append(f"ws{number} = {w} + (expert * outs + n.to(tl.int64))[:, None] * ins + d[None, :]")
        inner.append(f"wide{number} = tl.trans(tl.load(ws{number} + first{mask}))")
        inner.append(f"acc{number} = tl.dot(narrow, wide{number}, acc{number}, input_precision='ieee')")
        source.define(product.result, f"acc{number}")
    for number, bias in enumerate(group.biases):
        table = argument(f"b{number}", bias.values[0])
        load = f"tl.load({table} + expert * outs + n, mask=n < outs, other=0.0)"
        source.define(bias.result, f"{load}.to(tl.float32)[None, :]")
    for equation in group.following:
        source.equation(equation)
    stores = []
    for number, value in enumerate(group.stored):
        y = argument(f"y{number}", value)
        at = f"{y} + pair.to(tl.int64)[:, None] * outs + n[None, :]"
        stores.append(f"tl.store({at}, {source.names[value.name]}.to({y}.dtype.element_ty), mask=ok)")
    constants = {"outs": outs, "ins": ins, "shared": group.shared, "rows": tile.rows, "tile": tile.outs,
                 "depth": depth}  # fmt: skip
    signature = ", ".join([*(name for name, _ in arguments), *(f"{name}: tl.constexpr" for name in constants)])
    text = _TEXT.format(
        signature=signature, before=_indented(before, 8), inner=_indented(inner, 12), real=real,
        after=_indented([*source.lines, "ok = real[:, None] & (n < outs)[None, :]", *stores], 8),
    )  # fmt: skip
    launch = Launch("experts", "generated.experts", tuple(arguments), constants, tile.warps, tile.stages, text=text)
    return launch, where


def _indented(lines: Sequence[str], spaces: int) -> str:
    return "\n".join(" " * spaces + line for line in lines)


_TEXT = """import triton
import triton.language as tl

from compiler.kernels.codes import plain
from compiler.kernels.dense import scale_of
from compiler.kernels.overlap import wait
from compiler.kernels.widened import span_in


@triton.jit
def experts({signature}, overlap: tl.constexpr = False):
    wait(overlap)
    n = tl.program_id(0) * tile + tl.arange(0, tile)
    d = tl.arange(0, depth)
    here = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    for index in range(here, tl.load(total), tl.num_programs(1) * tl.num_programs(2)):
        expert = tl.load(owners + index).to(tl.int64)
        pair = tl.load(slots + index * rows + tl.arange(0, rows))
        real = pair >= 0
        xs = x + (pair // shared).to(tl.int64)[:, None] * ins + d[None, :]
{before}
        for first in range(0, ins, depth):
            at = first + d < ins
            narrow = tl.load(xs + first, mask={real}, other=0.0)
{inner}
{after}
"""
