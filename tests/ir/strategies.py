"""Random well-typed graphs: every operation, `repeat`, attributes of every literal kind, awkward floats and strings."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from compiler.ir import DTYPES, Builder, Graph, Sym, TensorType, Value
from compiler.ir.core import Arg, AttrValue
from compiler.ir.types import Dim
from specs.errors import SpecRTError, Where

_FLOATS = ("f32", "f16", "bf16")
_INTS = ("i64", "i32")
_DIMS: tuple[Dim, ...] = ("B", "S", 1, 2, 4, 8)
_UNARY = ("exp", "rsqrt", "cos", "sin", "tanh", "erf", "sigmoid", "relu", "silu")
_BINARY = ("add", "sub", "mul", "div", "maximum", "minimum")

numbers = st.floats(allow_nan=False) | st.integers(-(2**40), 2**40) | st.sampled_from([0.0, -0.0, 5e-324, 1e22, -1e-7])
# Everything that a string attribute may hold, line breaks, quotes and backslashes above all.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ['"', "\\", "a\nb", "\\n", "%x @ y"]
)
scalars: st.SearchStrategy[AttrValue] = numbers | st.booleans() | st.none() | texts
literals: st.SearchStrategy[AttrValue] = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6
)
places = st.none() | st.builds(
    Where, st.sampled_from(["model.yaml", "a folder/m.yaml"]), st.integers(1, 99), st.integers(1, 99)
)


class _Writer:
    """Draws one equation after the other; what the type rules refuse is not written."""

    def __init__(self, draw: Any) -> None:
        self.draw, self.builder = draw, Builder()
        self.inside = False

    def pick(self, values: list[Value], *dtypes: str) -> Value | None:
        fitting = [value for value in values if not dtypes or value.type.dtype in dtypes]
        return self.draw(st.sampled_from(fitting)) if fitting else None

    def emit(
        self, values: list[Value], op: str, *args: Arg, stated: TensorType | None = None, **attrs: AttrValue
    ) -> None:
        try:
            values.append(
                self.builder.emit(op, *args, to=self.draw(st.sampled_from(("a", "b.c", "x_1"))), type=stated, **attrs)
            )
        except SpecRTError as error:
            if error.code != "IR-002":  # no other failure, whatever the operands
                raise

    def shape(self, *, static: bool = False) -> tuple[Dim, ...]:
        dims = [dim for dim in _DIMS if isinstance(dim, int)] if static else list(_DIMS)
        return tuple(self.draw(st.lists(st.sampled_from(dims), min_size=1, max_size=3)))

    def source(self, values: list[Value]) -> None:
        name = self.draw(texts) + (self.draw(st.sampled_from(["{i}", "{2*i+1}"])) if self.inside else "")
        name = name if self.inside else name.replace("{", "(")
        kind = TensorType(self.draw(st.sampled_from(sorted(DTYPES))), self.shape(static=True))
        known = [e for e in self.builder.equations if e.attr.get("name") == name]
        if not known:
            self.emit(values, "weight", stated=kind, name=f"{name}.{len(self.builder._taken)}")

    def constant(self, values: list[Value]) -> None:
        shape = self.shape(static=True)
        dtype = self.draw(st.sampled_from(["f32", "i32", "bool"]))
        leaf = {"f32": st.floats(width=32, allow_nan=False), "i32": st.integers(-9, 9), "bool": st.booleans()}[dtype]

        def nest(dims: tuple[Dim, ...]) -> AttrValue:
            return tuple(nest(dims[1:]) for _ in range(int(dims[0]))) if dims else self.draw(leaf)

        self.emit(values, "const", stated=TensorType(dtype, shape), value=nest(shape))

    def elementwise(self, values: list[Value]) -> None:
        x = self.pick(values)
        assert x is not None  # inputs are always there
        other = self.pick([value for value in values if value.type == x.type])
        literal = self.draw(st.floats(allow_nan=False) if x.type.dtype in _FLOATS else st.integers(-9, 9))
        args = self.draw(st.sampled_from([(x, other), (other, x), (x, literal), (literal, x)]))
        kind = self.draw(st.sampled_from(["binary", "compare", "logical", "where", "cast", "gelu", "unary"]))
        if kind == "binary":
            self.emit(values, self.draw(st.sampled_from(_BINARY)), *args)
        elif kind == "compare":
            self.emit(values, "compare", *args, kind=self.draw(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"])))
        elif kind == "logical":
            flag = self.pick(values, "bool")
            if flag is not None:
                self.emit(values, self.draw(st.sampled_from(["and", "or"])), flag, flag)
        elif kind == "where":
            flag = self.pick(values, "bool")
            if flag is not None:
                self.emit(values, "where", flag, *args)
        elif kind == "cast":
            self.emit(values, "cast", x, dtype=self.draw(st.sampled_from(sorted(DTYPES))))
        elif kind == "gelu":
            self.emit(values, "gelu", x, approximate=self.draw(st.booleans()))
        else:
            self.emit(values, self.draw(st.sampled_from(_UNARY)), x)

    def moving(self, values: list[Value]) -> None:
        x = self.pick(values)
        assert x is not None
        rank = x.type.rank
        axis = -self.draw(st.integers(1, 3))
        kind = self.draw(st.sampled_from(["reshape", "transpose", "concat", "slice", "gather", "reduce", "matmul"]))
        if kind == "reshape":
            self.emit(values, "reshape", x, shape=tuple(self.draw(st.permutations(x.type.shape))))
        elif kind == "transpose" and rank:
            size = self.draw(st.integers(1, rank))
            self.emit(values, "transpose", x, axes=tuple(self.draw(st.permutations(range(-size, 0)))))
        elif kind == "concat":
            self.emit(values, "concat", x, x, axis=axis)
        elif kind == "slice":
            start = self.draw(st.integers(0, 3))
            self.emit(values, "slice", x, axis=axis, start=start, stop=start + self.draw(st.integers(1, 4)))
        elif kind == "gather":
            index = self.pick(values, *_INTS)
            self.emit(values, "gather", x, index or x)
        elif kind == "matmul":
            y = self.pick(values, x.type.dtype)
            self.emit(values, "matmul", x, y or x, transpose_b=self.draw(st.booleans()))
        else:
            self.emit(values, self.draw(st.sampled_from(["mean", "sum", "softmax"])), x)

    def fused(self, values: list[Value]) -> None:
        """Norms and attention on operands made to fit: also operands left out and options of every kind."""
        dtype, eps = self.draw(st.sampled_from(_FLOATS)), self.draw(st.floats(1e-12, 1e-3))
        made: list[Value] = []
        for size in ((8,), (8,), (4, 2, 2, 8), (4, 2, 1, 8)):
            self.source_of(made, TensorType(dtype, size))
        gain, bias, q, k = made
        kind = self.draw(st.sampled_from(["rms_norm", "layer_norm", "attention"]))
        if kind == "rms_norm":
            self.emit(values, "rms_norm", q, gain, eps=eps)
        elif kind == "layer_norm":
            vectors = [self.draw(st.sampled_from([vector, None])) for vector in (gain, bias)]
            self.emit(values, "layer_norm", q, *vectors, eps=eps)
        else:
            self.source_of(made, TensorType("i32", (4, 2)))
            self.source_of(made, TensorType(dtype, (2,)))
            self.emit(
                values, "attention", q, k, k, made[-2], None, self.draw(st.sampled_from([made[-1], None])), scale=eps,
                causal=self.draw(st.booleans()), window=self.draw(st.none() | st.integers(1, 9)),
                softcap=self.draw(st.none() | st.floats(1, 50)), slopes=self.draw(st.sampled_from([None, (0.5, 0.25)])),
            )  # fmt: skip

    def source_of(self, values: list[Value], kind: TensorType) -> None:
        suffix = ".{i}" if self.inside else ""
        self.emit(values, "weight", stated=kind, name=f"w{len(self.builder._taken)}{suffix}")

    def equations(self, values: list[Value], count: int) -> None:
        steps = (self.elementwise, self.elementwise, self.moving, self.moving, self.source, self.constant, self.fused)
        for _ in range(count):
            self.builder.where = self.draw(places)
            self.draw(st.sampled_from(steps))(values)

    def repeat(self, values: list[Value]) -> None:
        carried = self.draw(st.lists(st.sampled_from(values), min_size=1, max_size=2))

        def body(*params: Value) -> list[Value]:
            self.inside = True
            inner = [*values, *params]
            self.equations(inner, self.draw(st.integers(0, 4)))
            self.inside = False
            return [
                self.draw(st.sampled_from([value for value in inner if value.type == param.type])) for param in params
            ]

        values += self.builder.repeat(self.draw(st.integers(1, 80)), carried, [v.name for v in carried], body)


@st.composite
def graphs(draw: Any) -> Graph:
    """A graph that `verify` accepts."""
    writer = _Writer(draw)
    inputs = [
        writer.builder.input("tokens", "i32", "B", "S"),
        writer.builder.input("x", "f32", "B", "S", 8),
        writer.builder.input("h", draw(st.sampled_from(_FLOATS)), 4, 8),
    ]
    values = list(inputs)
    writer.equations(values, draw(st.integers(0, 6)))
    for _ in range(draw(st.integers(0, 2))):
        writer.repeat(values)
        writer.equations(values, draw(st.integers(0, 3)))
    dims = []
    for name in ("B", "S"):
        lo, opt, hi = sorted(draw(st.tuples(*[st.integers(1, 4096)] * 3)))
        dims.append(Sym(name, lo, opt, hi))
    chosen = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3, unique_by=lambda value: value.name))
    return writer.builder.graph("random", dims, inputs, [(f"out{i}", value) for i, value in enumerate(chosen)])
