"""Writes a Triton kernel for equations that work on rows: norms, activations, sums. One program takes one row, or a
piece of one where each number stands for itself: at one row a single multiprocessor would do all the work.

Every result is rounded to its own type, as the operation's definition does; in between all is float32. Low-bit codes
are held in float32 too, as the numbers that they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from compiler.ir.core import Arg, Equation, Value
from compiler.ir.formats import LARGEST_EXPONENT, RANGE
from compiler.kernels.attention import Launch, power

_ROUND = {
    "f16": ".to(tl.float16).to(tl.float32)", "bf16": ".to(tl.bfloat16).to(tl.float32)", "f32": "", "i32": "", "i8": "",
    "f8e4m3": "", "f4e2m1": "", "f8e8m0": "", "bool": "",
}  # fmt: skip
_SIGMOID = "(1.0 / (1.0 + tl.exp(-({0}))))"
_UNARY = {
    "exp": "tl.exp({0})",
    "rsqrt": "tl.rsqrt({0})",
    "cos": "tl.cos({0})",
    "sin": "tl.sin({0})",
    "erf": "tl.erf({0})",
    "sigmoid": _SIGMOID,
    "tanh": "(2.0 / (1.0 + tl.exp(-2.0 * ({0}))) - 1.0)",
    "relu": "tl.where({0} < 0, 0.0, {0})",
    "silu": "({0}) / (1.0 + tl.exp(-({0})))",
    "cast": "{0}",
}
_BINARY = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}",
    "minimum": "tl.minimum({0}, {1}, tl.PropagateNan.ALL)", "maximum": "tl.maximum({0}, {1}, tl.PropagateNan.ALL)",
}  # fmt: skip
CONSTS = 256  # numbers in the text of a kernel
_COMPARE = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_WHOLE = ("add", "sub", "minimum", "maximum", "where")  # exact below 2^24: positions, ids
ELEMENTWISE = (*_UNARY, *_BINARY, "gelu", "compare", "where")  # what works on a number at a time, in tiles of any shape
# What `quantize` does behind the division (compiler/ir/formats.py). In float32, 1.5 2^23 has no bits below 1: adding it
# rounds to whole numbers, ties to even; E4M3 is rounded to when it is stored, or read here (`exact`).
_CODES = {
    "i8": "(tl.minimum(tl.maximum(tl.where({0} != {0}, 0.0, {0}), -128.0), 127.0) + 12582912.0) - 12582912.0",
    "f8e4m3": "tl.where({0} != {0}, {0}, tl.minimum(tl.maximum({0}, -448.0), 448.0))",
    "f4e2m1": "nearest_e2m1({0})",
}
PIECE = 1024  # columns
_GELU = "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))"
_GELU_TANH = "{0} / (1.0 + tl.exp(-1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0})))"


class RefusedError(Exception):
    """Why equations have no kernel here; the engine keeps them."""


@dataclass
class RowSource:
    """A kernel in the making: lines, and the tensors that it takes, in order, by the place where each is stored."""

    columns: Callable[[Value], int]  # of a value, as rows are stored
    lines: list[str] = field(default_factory=list)
    pointers: dict[str, tuple[str, str]] = field(default_factory=dict)  # place -> (argument, dtype)
    sizes: set[str] = field(default_factory=set)  # dims whose sizes are arguments
    names: dict[str, str] = field(default_factory=dict)  # value -> variable
    spans: set[int] = field(default_factory=set)
    single: set[str] = field(default_factory=set)  # values that are one number a row
    places: dict[str, list[str]] = field(default_factory=dict)  # of a choice: a variable for each
    whole: bool = False  # whether something looks at a whole row

    def pointer(self, place: str, dtype: str) -> str:
        """The argument through which a place is reached; E8M0 as its bits. Raises RefusedError for bool."""
        if dtype == "bool":
            raise RefusedError("rows of bool between kernels")
        dtype = "u8" if dtype == "f8e8m0" else dtype
        return self.pointers.setdefault(place, (f"p{len(self.pointers)}", dtype))[0]

    def size(self, dim: str) -> str:
        """The argument that has the size of a dim."""
        self.sizes.add(dim)
        return dim

    def span(self, columns: int) -> tuple[str, str]:
        """Variables of the columns of a row and of which of them exist."""
        self.spans.add(columns)
        return f"at{columns}", f"ok{columns}"

    def load(self, value: Value, place: str, row: str, stride: int, start: int, columns: int) -> None:
        """Read columns of a stored row. Raises RefusedError for types that are only written here."""
        if value.type.dtype == "f8e8m0":
            raise RefusedError("rows of f8e8m0 are read by products")
        at, ok = self.span(columns)
        address = f"{self.pointer(place, value.type.dtype)} + {row} * {stride} + {start} + {at}"
        self._define(value, f"tl.load({address}, mask={ok}, other=0.0).to(tl.float32)")

    def index(self, place: str) -> str:
        """The row that an index tensor names."""
        name = f"i{len(self.lines)}"
        self.lines.append(f"{name} = tl.load({self.pointer(place, 'i32')} + row).to(tl.int64)")
        return name

    def index_of(self, value: Value) -> str:
        """The row that an index names which is computed here."""
        name = f"i{len(self.lines)}"
        self.lines.append(f"{name} = {self.names[value.name]}.to(tl.int64)")
        return name

    def const(self, value: Value, numbers: Sequence[float]) -> None:
        """A row of numbers that stand in the text."""
        if len(numbers) > CONSTS:
            raise RefusedError(f"a constant of {len(numbers)} numbers")
        self.names[value.name] = self._gathered([repr(number) for number in numbers], "float32")

    def store(self, value: Value, place: str) -> None:
        """Write a row."""
        columns = self.columns(value)
        argument = self.pointer(place, value.type.dtype)
        if value.name in self.single:
            self.lines.append(f"tl.store({argument} + row, {self.names[value.name]})")
            return
        name = self.names[value.name]
        if value.type.dtype == "f8e8m0":  # the number is a power of two: its exponent's bits
            name = f"({name}.to(tl.int32, bitcast=True) >> 23)"
        at, ok = self.span(columns)
        where = f"{argument} + row * {columns} + {at}"
        self.lines.append(f"tl.store({where}, {name}.to({argument}.dtype.element_ty), mask={ok})")

    def equation(self, equation: Equation) -> None:
        """Compute one equation of rows that are loaded. Raises RefusedError for what has no rule here."""
        if equation.op in ("rms_norm", "layer_norm"):
            self._norm(equation)
        elif equation.op == "row_scale":
            self._row_scale(equation)
        elif equation.op in ("quantize", "dequantize"):
            self._rounded(equation)
        elif equation.op in ELEMENTWISE:
            self._elementwise(equation)
            return
        elif equation.op in ("softmax", "top_k", "take", "sum"):
            self._route(equation)
        else:
            raise RefusedError(f"`{equation.op}` has no rule for rows")
        self.whole = True

    def _elementwise(self, equation: Equation) -> None:
        operands = [self.read(arg) for arg in equation.args]
        self._alike(equation)
        if equation.result.type.dtype == "i32" and equation.op not in _WHOLE:
            raise RefusedError(f"`{equation.op}` of whole numbers")
        if equation.op == "gelu":
            text = _GELU_TANH if equation.attr["approximate"] else _GELU
        elif equation.op == "compare":
            text = f"{{0}} {_COMPARE[str(equation.attr['kind'])]} {{1}}"
        elif equation.op == "where":
            text = "tl.where({0}, {1}, {2})"
        else:
            text = _UNARY[equation.op] if equation.op in _UNARY else _BINARY[equation.op]
        self._define(equation.result, text.format(*operands), rounded=True)
        if all(value.name in self.single for value in equation.values):
            self.single.add(equation.result.name)

    def _route(self, equation: Equation) -> None:
        """What a router does with the scores of a row: their softmax, the largest, their sum."""
        x, columns, number = equation.values[0], self.columns(equation.values[0]), len(self.lines)
        if columns != x.type.shape[-1] or equation.result.type.dtype not in _ROUND:
            raise RefusedError(f"`{equation.op}` of {columns} columns in groups of {x.type.shape[-1]}")
        at, ok = self.span(columns)
        row = self.read(x)
        if equation.op == "sum":
            self._define(equation.result, f"tl.sum(tl.where({ok}, {row}, 0.0), 0)", rounded=True)
            self.single.add(equation.result.name)
        elif equation.op == "softmax":
            if len(equation.values) > 1:
                raise RefusedError("`softmax` with a sink")
            self.lines.append(
                f"e{number} = tl.where({ok}, tl.exp({row} - tl.max(tl.where({ok}, {row}, -1e38), 0)), 0.0)"
            )
            self._define(equation.result, f"e{number} / tl.sum(e{number}, 0)", rounded=True)
        elif equation.op == "top_k":
            self.lines.append(f"t{number} = tl.where({ok}, {row}, float('-inf'))")
            names = [f"k{number}_{choice}" for choice in range(self.columns(equation.result))]
            for name in names:  # of equals the first; where all are NaN, none: the place behind the last
                self.lines.append(f"{name} = tl.min(tl.where(t{number} == tl.max(t{number}, 0), {at}, {columns}), 0)")
                self.lines.append(f"t{number} = tl.where({at} == {name}, float('-inf'), t{number})")
            self.places[equation.result.name] = names
            self.names[equation.result.name] = self._gathered(names, "int32")
        else:
            if equation.values[1].name not in self.places:
                raise RefusedError("`take` of places that are not chosen here")
            found = [f"tl.sum(tl.where({at} == {k}, {row}, 0.0), 0)" for k in self.places[equation.values[1].name]]
            self._define(equation.result, self._gathered(found, "float32"))

    def _gathered(self, numbers: Sequence[str], kind: str) -> str:
        """A row of single numbers."""
        at, _ = self.span(len(numbers))
        name = f"g{len(self.lines)}"
        self.lines.append(f"{name} = tl.zeros([{power(len(numbers))}], tl.{kind})")
        self.lines += [f"{name} = tl.where({at} == {place}, {one}, {name})" for place, one in enumerate(numbers)]
        return name

    def read(self, arg: Arg) -> str:
        """An operand as text."""
        if isinstance(arg, Value):
            if arg.name not in self.names:
                raise RefusedError(f"%{arg.name} is no row")
            return self.names[arg.name]
        if isinstance(arg, (int, float)):
            return f"({float(arg)!r})"
        raise RefusedError("an operand is missing")

    @staticmethod
    def rounded(value: Value, text: str) -> str:
        """Numbers as they are in the type of a value."""
        return f"({text}){_ROUND[value.type.dtype]}"

    def given(self, value: Value, text: str) -> None:
        """A value whose elements were written elsewhere."""
        self._define(value, text)

    def _define(self, value: Value, text: str, rounded: bool = False) -> None:
        dtype = value.type.dtype
        if dtype not in _ROUND:
            raise RefusedError(f"rows of {dtype}")
        name = f"v{len(self.lines)}"  # of its line: a value that is defined in parts has several
        self.lines.append(f"{name} = ({text}){_ROUND[dtype] if rounded else ''}")
        self.names[value.name] = name

    def _alike(self, equation: Equation) -> None:
        """Operands have a number for each of the result's, or one a row. Raises RefusedError for other broadcasts."""
        columns = self.columns(equation.result)
        for value in equation.values:
            if self.columns(value) not in (columns, 1) and value.name not in self.single:
                raise RefusedError(f"`{equation.op}` of rows of {self.columns(value)} and {columns}")

    def _norm(self, equation: Equation) -> None:
        x, result = self.read(equation.args[0]), equation.result
        columns = self.columns(result)
        if int(result.type.shape[-1]) != columns:
            self._norm_of_heads(equation, int(result.type.shape[-1]))
            return
        self._alike(equation)
        _, ok = self.span(columns)
        if equation.op == "layer_norm":
            centred = f"c{len(self.lines)}"
            self.lines.append(f"{centred} = tl.where({ok}, {x} - tl.sum({x}, 0) / {columns}, 0.0)")
            x = centred
        scale = f"tl.rsqrt(tl.sum({x} * {x}, 0) / {columns} + {equation.attr['eps']!r})"
        self._define(result, f"{x} * {scale}", rounded=True)
        for arg, sign in zip(equation.args[1:], "*+"):  # noqa: B905 - the bias may be left out
            if arg is not None:
                self._define(result, f"{self.names[result.name]} {sign} {self.read(arg)}", rounded=True)

    def _norm_of_heads(self, equation: Equation, dim: int) -> None:
        """A norm of each head of a row: as [heads, dim], where the heads behind the last are zeros."""
        result, columns, number = equation.result, self.columns(equation.result), len(self.lines)
        if dim != power(dim):
            raise RefusedError(f"norms of {dim} of {columns} columns")
        self.span(columns)
        self.lines.append(f"h{number} = tl.reshape({self.read(equation.args[0])}, [{power(columns) // dim}, {dim}])")
        if equation.op == "layer_norm":
            self.lines.append(f"h{number} = h{number} - tl.sum(h{number}, 1)[:, None] / {dim}")
        square = f"tl.sum(h{number} * h{number}, 1)[:, None] / {dim} + {equation.attr['eps']!r}"
        rounding = _ROUND[result.type.dtype]
        self.lines.append(f"h{number} = (h{number} * tl.rsqrt({square})){rounding}")
        for arg, sign in zip(equation.args[1:], "*+"):  # noqa: B905 - the bias may be left out
            if arg is not None:
                self.lines.append(f"h{number} = (h{number} {sign} {self.read(arg)}[None, :]){rounding}")
        self._define(result, f"tl.reshape(h{number}, [{power(columns)}])")

    def _row_scale(self, equation: Equation) -> None:
        (x,), result = equation.values, equation.result
        dtype, block = str(equation.attr["dtype"]), equation.attr.get("block")
        if dtype not in _CODES:
            raise RefusedError(f"scales for {dtype}")
        columns, number = self.columns(x), len(self.lines)
        _, ok = self.span(columns)
        self.lines.append(f"m{number} = tl.where({ok}, tl.abs({self.read(x)}), 0.0)")
        if block is None:
            self.single.add(result.name)
        else:
            self.lines.append(f"m{number} = tl.reshape(m{number}, {self._blocks(columns, block)})")
        axis = 0 if block is None else 1
        # a row with a NaN has a scale of NaN, as the definition's maximum
        self.lines.append(f"b{number} = tl.max((m{number} != m{number}).to(tl.int32), {axis})")
        if result.type.dtype == "f8e8m0":
            step, other = f"power_of_two(tl.max(m{number}, {axis}), {LARGEST_EXPONENT[dtype]})", "1.0"
        else:
            largest = RANGE[dtype][1]
            step, other = f"tl.maximum(tl.div_rn(tl.max(m{number}, {axis}), {largest:.1f}), 1e-12)", "float('nan')"
        self._define(result, f"tl.where(b{number} > 0, {other}, {step})")

    def _rounded(self, equation: Equation) -> None:
        """To codes or back: x / (scale outer), or codes times that, in float32 as the definitions."""
        x, scale, zero, outer = (*equation.args, None, None)[:4]
        codes = (equation.result if equation.op == "quantize" else equation.values[0]).type.dtype
        if codes not in _CODES or zero is not None or not isinstance(x, Value) or not isinstance(scale, Value):
            raise RefusedError(f"rounding to {codes} with a zero")
        number, columns, block = len(self.lines), self.columns(x), equation.attr.get("block")
        step = self.exact(scale) + (f" * {self.read(outer)}" if outer is not None else "")
        if isinstance(block, tuple):
            self.span(columns)
            wide = f"tl.broadcast_to(({step})[:, None], {self._blocks(columns, block[-1])})"
            step = f"tl.reshape({wide}, [{power(columns)}])"
        if equation.op == "quantize":
            self.lines.append(f"q{number} = tl.div_rn({self.read(x)}, {step} + tl.zeros_like({self.read(x)}))")
            self._define(equation.result, _CODES[codes].format(f"q{number}"))
        else:
            self._define(equation.result, f"{self.exact(x)} * ({step})", rounded=True)

    def exact(self, value: Value) -> str:
        """A value as it is when it has been stored."""
        return f"nearest_e4m3({self.read(value)})" if value.type.dtype == "f8e4m3" else self.read(value)

    @staticmethod
    def _blocks(columns: int, block: object) -> str:
        if not isinstance(block, int) or block != power(block) or columns % block:
            raise RefusedError(f"a scale for {block} of {columns} columns")
        return f"[{power(columns) // block}, {block}]"

    @property
    def pieces(self) -> int:
        """How many programs a row has; all rows of the kernel are as wide then."""
        single = self.whole or self.single or len(self.spans) != 1
        return 1 if single else -(-max(self.spans) // PIECE)

    def launch(self) -> Launch:
        """The kernel as it stands."""
        arguments = (*self.pointers.values(), *((dim, "int") for dim in sorted(self.sizes)))
        names = [name for name, _ in arguments]
        spans = []
        for columns in sorted(self.spans):
            size, first = (power(columns), "") if self.pieces == 1 else (PIECE, f"tl.program_id(2) * {PIECE} + ")
            spans += [f"at{columns} = {first}tl.arange(0, {size})", f"ok{columns} = at{columns} < {columns}"]
        lines = ["wait(overlap)", "row = tl.program_id(0).to(tl.int64)", *spans, *self.lines]
        body = "\n".join(f"    {line}" for line in lines)
        text = (
            f"import triton\nimport triton.language as tl\n{_imports(body)}\n\n@triton.jit\n"
            f"def rows({', '.join([*names, 'overlap: tl.constexpr = False'])}):\n{body}\n"
        )
        widest = max(self.spans, default=1) if self.pieces == 1 else PIECE
        return Launch("rows", "generated.rows", arguments, {}, 8 if widest > 2048 else 4, 2, text=text)


def _imports(body: str) -> str:
    """The lines that bring the functions that a kernel calls."""
    called = [name for name in ("nearest_e2m1", "nearest_e4m3", "power_of_two") if f"{name}(" in body]
    codes = f"from compiler.kernels.codes import {', '.join(called)}\n" if called else ""
    return f"\n{codes}from compiler.kernels.overlap import wait\n"


def rows_of(value: Value) -> tuple[str, ...]:
    """The dims in front that count rows: those that are no numbers."""
    dims = []
    for dim in value.type.shape:
        if not isinstance(dim, str):
            break
        dims.append(dim)
    return tuple(dims)


def aliases(equations: Sequence[Equation]) -> dict[str, str]:
    """Values that lie where another does: reshapes that leave rows as they are."""
    found: dict[str, str] = {}
    for equation in equations:
        if equation.op == "reshape" and isinstance(equation.args[0], Value):
            before = equation.args[0]
            if rows_of(before) and rows_of(before) == rows_of(equation.result):
                found[equation.result.name] = found.get(before.name, before.name)
    return found
