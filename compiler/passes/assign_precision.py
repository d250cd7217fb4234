"""Gives weights, activations and the KV cache their element type; float32 is what a graph is built in.

Norm statistics, rotary tables, softmax and attention are computed in float32 inside their operations whatever the
operands are, and logits are cast to float32 at the end. Where a float32 value meets an activation it is cast to the
activation's type, literals too: a scale of 39.19 is 39.25 in bfloat16, as in models that keep it in that type.
"""

from __future__ import annotations

import struct
from dataclasses import replace

from compiler.ir.core import Arg, Block, Equation, Graph, Value
from compiler.ir.ops import REGISTRY
from compiler.ir.types import TensorType
from compiler.passes.rewrite import Names, beside
from compiler.passes.runner import Log, Pass
from specs.errors import SpecRTError

# TF32 is no type of tensors: engines may multiply float32 so (compiler/lower/tensorrt/build.py).
DTYPES = {"fp32": "f32", "tf32": "f32", "bf16": "bf16", "fp16": "f16"}
# Finite range: a literal beyond it (a masked score) becomes the nearest finite number.
_LARGEST = {"bf16": 3.3895313892515355e38, "f16": 65504.0}
# Left as plain equations, these lose too much in 16 bits.
_WIDE = frozenset({"mean", "sum", "rsqrt", "exp"})
# Operands that are float32 by the operation's definition.
_FLOAT32_OPERANDS = {"rotate": (1, 2)}


def assign_precision(precision: str) -> Pass:
    """The pass for fp32, tf32, bf16 or fp16; raises SpecRTError PASS-002 for another."""
    if precision not in DTYPES:
        raise SpecRTError("PASS-002", f"unknown precision `{precision}`", hint=f"known: {', '.join(DTYPES)}")
    dtype = DTYPES[precision]

    def apply(graph: Graph, log: Log) -> Graph:
        return graph if dtype == "f32" else _Assigner(graph, dtype, log).run()

    return Pass("assign_precision", apply)


def _rounded(number: float, dtype: str) -> float:
    """The nearest number of the type, ties to even: a literal is of the type of the tensor beside it."""
    if dtype == "f16":
        return float(struct.unpack("<e", struct.pack("<e", number))[0])
    bits = int.from_bytes(struct.pack(">f", number), "big")
    bits += 0x7FFF + (bits >> 16 & 1)
    return float(struct.unpack(">f", (bits >> 16 << 16).to_bytes(4, "big"))[0])


class _Assigner:
    def __init__(self, graph: Graph, dtype: str, log: Log) -> None:
        self.graph, self.dtype, self.log = graph, dtype, log
        self.names = Names(graph)
        self.values: dict[str, Value] = {}
        self.casts: dict[tuple[str, str], Value] = {}

    def run(self) -> Graph:
        graph = self.graph
        equations = self.block(graph.equations)
        outputs = []
        for name, value in graph.outputs:
            new = self.values.get(value.name, value)
            outputs.append((name, self.cast(new, value.type.dtype, equations) if new.type != value.type else new))
        return replace(graph, equations=tuple(equations), outputs=tuple(outputs))

    def block(self, equations: tuple[Equation, ...]) -> list[Equation]:
        out: list[Equation] = []
        for equation in equations:
            out.append(self.repeat(equation, out) if equation.body is not None else self.equation(equation, out))
        return out

    def repeat(self, equation: Equation, out: list[Equation]) -> Equation:
        body = equation.body
        assert body is not None
        args = tuple(self.value(value, out) for value in equation.values)
        params = tuple(self.retyped(old, new.type) for old, new in zip(body.params, args, strict=True))
        casts = dict(self.casts)  # those made inside are not seen outside
        equations = self.block(body.equations)
        results = []
        for old, param in zip(body.results, params, strict=True):
            value = self.values.get(old.name, old)
            results.append(self.cast(value, param.type.dtype, equations) if value.type != param.type else value)
        self.casts = casts
        outs = tuple(self.retyped(old, new.type) for old, new in zip(equation.results, args, strict=True))
        return replace(equation, args=args, results=outs, body=Block(params, tuple(equations), tuple(results)))

    def equation(self, equation: Equation, out: list[Equation]) -> Equation:
        if equation.op in ("weight", "state"):
            if not equation.result.type.is_float:
                return equation
            self.log.hit(f"{self.dtype}_{equation.op}", equation.result.name, equation.where)
            result = self.retyped(equation.result, equation.result.type.with_dtype(self.dtype))
            return replace(equation, results=(result,))
        if not equation.values:
            return equation
        args = tuple(self.values.get(arg.name, arg) if isinstance(arg, Value) else arg for arg in equation.args)
        args = self.met(equation.op, args, out)
        attrs = equation.attrs
        types = REGISTRY[equation.op].infer_types(args, equation.attr)
        results = tuple(self.retyped(old, kind) for old, kind in zip(equation.results, types, strict=True))
        return replace(equation, args=args, attrs=attrs, results=results)

    def met(self, op: str, args: tuple[Arg, ...], out: list[Equation]) -> tuple[Arg, ...]:
        """The operands in types that the operation takes together."""
        fixed = _FLOAT32_OPERANDS.get(op, ())
        floats = {
            arg.type.dtype
            for index, arg in enumerate(args)
            if isinstance(arg, Value) and arg.type.is_float and index not in fixed
        }
        if op in _WIDE:
            wanted = "f32"
        elif len(floats) > 1 or floats == {self.dtype}:
            wanted = self.dtype
        else:
            return args
        return tuple(
            self.cast(arg, "f32" if index in fixed else wanted, out) if isinstance(arg, Value) and arg.type.is_float
            else self.literal(arg, wanted)
            for index, arg in enumerate(args)
        )  # fmt: skip

    @staticmethod
    def literal(arg: Arg, dtype: str) -> Arg:
        if not isinstance(arg, float) or dtype not in _LARGEST or abs(arg) == float("inf"):
            return arg
        limit = _LARGEST[dtype]
        return _rounded(max(-limit, min(limit, arg)), dtype)

    def value(self, value: Value, out: list[Equation]) -> Value:
        """A carried value: floats are activations."""
        new = self.values.get(value.name, value)
        return self.cast(new, self.dtype, out) if new.type.is_float else new

    def cast(self, value: Value, dtype: str, out: list[Equation]) -> Value:
        if value.type.dtype == dtype:
            return value
        key = (value.name, dtype)
        if key not in self.casts:
            new = Value(self.names.unique(beside(value.name, dtype)), value.type.with_dtype(dtype))
            where = out[-1].where if out else None
            out.append(Equation("cast", (value,), (new,), (("dtype", dtype),), None, where))
            self.casts[key] = new
            self.log.hit("cast", new.name, where)
        return self.casts[key]

    def retyped(self, value: Value, kind: TensorType) -> Value:
        new = self.values[value.name] = Value(value.name, kind)
        return new
