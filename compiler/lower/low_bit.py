"""Products of quantized weights in a graph: what meets in each, and which equations a kernel of ours takes over.

A toolchain's file says for each kind whether its engines run it or a kernel does (specs/toolchains).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from compiler.ir.core import Equation, Graph, Value
from compiler.kernels.expert_codes import expert_in_words
from compiler.kernels.products import group_of, in_words, multiplies
from compiler.kernels.row_source import RefusedError
from compiler.lower.capability import Judge, Unsupported
from compiler.lower.layouts import COLUMNS, WORDS
from compiler.lower.partition import partition
from compiler.lower.plan import ROWS
from compiler.lower.segments import engine_segment
from compiler.passes.join_codes import RowScales
from compiler.passes.rewrite import Names
from specs.hardware import Operands, load_toolchain, product_of

_LOG = logging.getLogger("compiler.lower")


@dataclass(frozen=True)
class LowBitProduct:
    """A product, the dequantize of its weight, and the equations that round its input (none: it is not rounded)."""

    product: Equation
    weight: Equation
    rounding: tuple[Equation, ...]
    operands: Operands

    @property
    def owner(self) -> str:
        """What products that share a rounded input have in common; they are one step."""
        return (self.rounding[-1] if self.rounding else self.product).result.name

    @property
    def equations(self) -> tuple[Equation, ...]:
        """All that its step computes."""
        return (self.weight, *self.rounding, self.product)

    def in_words(self, architecture: int) -> bool:
        """Whether a kernel reads the weight's codes in words (compiler/kernels/products.py)."""
        x = self.operands.activations
        if x is None or not multiplies(x, self.operands.weights, architecture):
            x = self.product.values[0].type.dtype
        return in_words(x, self.operands.weights, group_of(self.weight))


@dataclass(frozen=True)
class KernelSteps:
    """Which products a toolchain leaves to kernels on an architecture (90 is sm_90).

    `judge` says of a dequantize whether an engine can have it: not blocks of every size. `baked`: engines hold their
    weights. `alone`: there are no engines.
    """

    toolchain: str
    architecture: int
    judge: Judge | None = None
    baked: bool = False
    alone: bool = False

    def take(self, product: LowBitProduct) -> bool:
        """Whether a product runs as a kernel of ours: its file says so, or the engine has no layer for its blocks."""
        if self.alone:
            return True
        found = product_of(load_toolchain(self.toolchain), product.operands, self.architecture)
        if found is None or found.how != "native":
            return found is not None and found.how == "kernel"
        if (found.baked and not self.baked) or self.judge is None:
            return found.baked and not self.baked
        return any(isinstance(self.judge(equation), Unsupported) for equation in (product.weight, *product.rounding))

    @property
    def norms(self) -> bool:
        """Whether norms of whole rows, and what has no product beside them, are kernels."""
        return not self.baked and load_toolchain(self.toolchain).norms is not None

    def of(self, equations: Iterable[Equation]) -> list[LowBitProduct]:
        """The products among equations that do."""
        return [product for product in low_bit_products(equations) if self.take(product)]

    def refuse(self, segment: Graph) -> str | None:
        """Why a segment can't be kernels at every number of rows, or None."""
        from compiler.kernels.rows import SIZES, program_of

        try:
            for size in SIZES:
                program_of(segment, size, self.architecture)
        except RefusedError as error:
            return str(error)
        return None

    def known(self, graph: Graph, owner: dict[str, str], what: str) -> tuple[dict[str, str], str | None]:
        """Of results and the steps that own them those whose steps can be kernels, and why the last other one can't."""
        refused: set[str] = set()
        reason: str | None = None
        for piece in partition(graph, lambda equation: owner.get(equation.results[0].name)) if owner else ():
            why = self.refuse(engine_segment(piece.graph).graph) if piece.kind == "step" else None
            if why is not None:
                reason = why
                _LOG.info("%s of %s stay in their engine: %s", what, graph.name, reason)
                refused |= {equation.results[0].name for equation in piece.graph.equations}
        return {name: step for name, step in owner.items() if name not in refused}, reason


def low_bit_experts(equations: Iterable[Equation]) -> list[tuple[Equation, Equation]]:
    """The products of experts with quantized matrices among equations, each with its dequantize."""
    made: dict[str, Equation] = {}
    found: list[tuple[Equation, Equation]] = []
    for equation in equations:
        made.update((value.name, equation) for value in equation.results)
        weight = made.get(equation.values[1].name) if equation.op == "gather_matmul" else None
        if weight is not None and weight.op == "dequantize":
            found.append((equation, weight))
    return found


def kernel_layouts(equations: Sequence[Equation], architecture: int) -> Iterator[tuple[Value, str]]:
    """How kernels read the parts of quantized weights among equations."""
    read = [(product.weight, product.in_words(architecture)) for product in low_bit_products(equations)]
    experts = [(weight, expert_in_words(product, weight)) for product, weight in low_bit_experts(equations)]
    for weight, words in (*read, *experts):
        codes, *others = weight.values
        yield codes, WORDS if words else ROWS
        turned = words or codes.type.rank == 2
        yield from ((value, COLUMNS if turned and value.type.rank > 1 else ROWS) for value in others)


def low_bit_products(equations: Iterable[Equation]) -> list[LowBitProduct]:
    """The products of quantized weights among equations, in order; what other blocks define may be left out."""
    made: dict[str, Equation] = {}
    found: list[LowBitProduct] = []
    for equation in equations:
        made.update((value.name, equation) for value in equation.results)
        if equation.op != "matmul" or not equation.attr.get("transpose_b"):
            continue
        x, weight = (made.get(value.name) for value in equation.values)
        if weight is None or weight.op != "dequantize" or _op(made, weight.values[0]) == "quantize":
            continue
        rounding = _rounding(made, x)
        operands = _operands(weight.values[0].type.dtype, rounding)
        found.append(LowBitProduct(equation, weight, rounding, operands))
    return found


def _op(made: dict[str, Equation], value: Value) -> str | None:
    equation = made.get(value.name)
    return None if equation is None else equation.op


def _rounding(made: dict[str, Equation], x: Equation | None) -> tuple[Equation, ...]:
    """The equations that round a product's input, the dequantize last; none where it is not rounded."""
    if x is None or x.op != "dequantize" or _op(made, x.values[0]) != "quantize":
        return ()
    before: list[Equation] = []
    scale = made.get(x.values[1].name)
    while scale is not None and scale.op in ("row_scale", "quantize", "maximum"):  # a rounded scale: how it is made
        before.insert(0, scale)
        scale = made.get(scale.values[0].name) if scale.op != "row_scale" else None
    return (*before, made[x.values[0].name], x)


def _operands(weights: str, rounding: tuple[Equation, ...]) -> Operands:
    if not rounding:
        return Operands(weights)
    last = rounding[-1]
    codes, scale = last.values[:2]
    block = last.attr.get("block")
    if isinstance(block, tuple):
        static = len(last.args) > 3  # blocks over a scale of the whole tensor that calibration found
        return Operands(weights, codes.type.dtype, "static" if static else "dynamic", "block", int(str(block[-1])))
    if scale.type.shape == (1,):
        return Operands(weights, codes.type.dtype, "static", "tensor")
    return Operands(weights, codes.type.dtype, "dynamic", "token")


def with_row_scales(graph: Graph) -> Graph:
    """A graph without `repeat` in which quantized weights have a scale for each row at least, as kernels read them."""
    whole = {
        product.weight.result.name
        for product in low_bit_products(graph.equations)
        if product.weight.values[1].type.shape[-2] != product.weight.values[0].type.shape[-2]
    }
    names = Names(graph)
    out: list[Equation] = []
    for equation in graph.equations:
        if equation.results[0].name in whole:
            codes, scale, *more = equation.args
            assert isinstance(codes, Value)
            assert isinstance(scale, Value)
            own = RowScales(names, out, equation)
            equation = replace(equation, args=(codes, own.by_row(codes, scale), *more), attrs=own.attrs)
        out.append(equation)
    return replace(graph, equations=tuple(out))
