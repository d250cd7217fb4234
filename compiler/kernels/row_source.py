"""Writes a Triton kernel for equations that work on rows: norms, activations, sums. One program takes one row.

Every result is rounded to its own type, as the operation's definition does; in between all is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from compiler.ir.core import Arg, Equation, Value
from compiler.kernels.attention import Launch, power

_ROUND = {"f16": ".to(tl.float16).to(tl.float32)", "bf16": ".to(tl.bfloat16).to(tl.float32)", "f32": ""}
_SIGMOID = "(1.0 / (1.0 + tl.exp(-({0}))))"
_UNARY = {
    "exp": "tl.exp({0})",
    "rsqrt": "tl.rsqrt({0})",
    "erf": "tl.erf({0})",
    "sigmoid": _SIGMOID,
    "tanh": "(2.0 / (1.0 + tl.exp(-2.0 * ({0}))) - 1.0)",
    "relu": "tl.where({0} < 0, 0.0, {0})",
    "silu": "({0}) / (1.0 + tl.exp(-({0})))",
    "cast": "{0}",
}
_BINARY = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}",
    "minimum": "tl.minimum({0}, {1})", "maximum": "tl.maximum({0}, {1})",
}  # fmt: skip
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
    names: dict[str, str] = field(default_factory=dict)  # value -> variable
    spans: set[int] = field(default_factory=set)

    def pointer(self, place: str, dtype: str) -> str:
        """The argument through which a place is reached."""
        return self.pointers.setdefault(place, (f"p{len(self.pointers)}", dtype))[0]

    def span(self, columns: int) -> tuple[str, str]:
        """Variables of the columns of a row and of which of them exist."""
        if columns not in self.spans:
            self.spans.add(columns)
            self.lines.append(f"at{columns} = tl.arange(0, {power(columns)})")
            self.lines.append(f"ok{columns} = at{columns} < {columns}")
        return f"at{columns}", f"ok{columns}"

    def load(self, value: Value, place: str, row: str, stride: int, start: int, columns: int) -> None:
        """Read columns of a stored row."""
        at, ok = self.span(columns)
        address = f"{self.pointer(place, value.type.dtype)} + {row} * {stride} + {start} + {at}"
        self._define(value, f"tl.load({address}, mask={ok}, other=0.0).to(tl.float32)")

    def index(self, place: str) -> str:
        """The row that an index tensor names."""
        name = f"i{len(self.lines)}"
        self.lines.append(f"{name} = tl.load({self.pointer(place, 'i32')} + row).to(tl.int64)")
        return name

    def store(self, value: Value, place: str) -> None:
        """Write a row."""
        columns = self.columns(value)
        at, ok = self.span(columns)
        argument = self.pointer(place, value.type.dtype)
        where = f"{argument} + row * {columns} + {at}"
        self.lines.append(f"tl.store({where}, {self.names[value.name]}.to({argument}.dtype.element_ty), mask={ok})")

    def equation(self, equation: Equation) -> None:
        """Compute one equation of rows that are loaded. Raises RefusedError for what has no rule here."""
        result = equation.result
        if equation.op in ("rms_norm", "layer_norm"):
            self._norm(equation)
        elif equation.op == "gelu":
            text = _GELU_TANH if equation.attr["approximate"] else _GELU
            self._define(result, text.format(self.read(equation.args[0])), rounded=True)
        elif equation.op in _UNARY:
            self._define(result, _UNARY[equation.op].format(self.read(equation.args[0])), rounded=True)
        elif equation.op in _BINARY:
            operands = [self.read(arg) for arg in equation.args]
            self._define(result, _BINARY[equation.op].format(*operands), rounded=True)
        else:
            raise RefusedError(f"`{equation.op}` has no rule for rows")

    def read(self, arg: Arg) -> str:
        """An operand as text."""
        if isinstance(arg, Value):
            if arg.name not in self.names:
                raise RefusedError(f"%{arg.name} is no row")
            return self.names[arg.name]
        if isinstance(arg, (int, float)):
            return f"({float(arg)!r})"
        raise RefusedError("an operand is missing")

    def _define(self, value: Value, text: str, rounded: bool = False) -> None:
        dtype = value.type.dtype
        if dtype not in _ROUND:
            raise RefusedError(f"rows of {dtype}")
        name = f"v{len(self.lines)}"  # of its line: a value that is defined in parts has several
        self.lines.append(f"{name} = ({text}){_ROUND[dtype] if rounded else ''}")
        self.names[value.name] = name

    def _norm(self, equation: Equation) -> None:
        x, result = self.read(equation.args[0]), equation.result
        columns = self.columns(result)
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

    def launch(self) -> Launch:
        """The kernel as it stands."""
        arguments = tuple((name, dtype) for name, dtype in self.pointers.values())
        body = "\n".join(f"    {line}" for line in ["row = tl.program_id(0).to(tl.int64)", *self.lines])
        text = (
            "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"
            f"def rows({', '.join(name for name, _ in arguments)}):\n{body}\n"
        )
        widest = max(self.spans, default=1)
        return Launch("rows", "generated.rows", arguments, {}, 8 if widest > 2048 else 4, 2, text=text)


def aliases(equations: Sequence[Equation]) -> dict[str, str]:
    """Values that lie where another does: reshapes that leave rows as they are."""
    found: dict[str, str] = {}
    for equation in equations:
        if equation.op == "reshape" and isinstance(equation.args[0], Value):
            before = equation.args[0]
            if before.type.shape[:1] == equation.result.type.shape[:1] and isinstance(before.type.shape[0], str):
                found[equation.result.name] = found.get(before.name, before.name)
    return found
