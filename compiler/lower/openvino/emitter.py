"""Walks a segment's equations and keeps what each value became: an OpenVINO output, or a tensor of weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import openvino as ov
import openvino.opset15 as ops

from compiler.ir.core import Arg, Equation, Value
from compiler.ir.ops import REGISTRY
from compiler.ir.types import TensorType
from compiler.lower.openvino.capabilities import ragged
from compiler.lower.openvino.stored import Stored, constant, evaluate, ir_value, stored_weight
from compiler.lower.plan import rounds, stored_name

if TYPE_CHECKING:
    import torch

# The OpenVINO type in which values of an IR type are held between operations.
_SAME = {"i32": "i32", "i8": "i8", "u8": "u8", "bool": "boolean"}
_IN_F32 = dict.fromkeys(("f32", "bf16", "f16", "f8e4m3", "i4", "u4", "f4e2m1", "f8e8m0"), "f32")
HELD = {**_IN_F32, **_SAME}
# The type of a port.
TYPES = {"f32": "f32", "bf16": "bf16", "f16": "f16", **_SAME}
Emission = Callable[["Emitter", Equation], ov.Output]
EMISSIONS: dict[str, Emission] = {}


def emits(*names: str) -> Callable[[Emission], Emission]:
    """Register how operations of these names are written."""

    def register(emission: Emission) -> Emission:
        EMISSIONS.update(dict.fromkeys(names, emission))
        return emission

    return register


class Emitter:
    """One segment being written; `parameters` and `extra` outputs collect on the way."""

    def __init__(
        self,
        weights: Callable[[str], torch.Tensor],
        progress: Callable[[str, int, int], None] | None,
        dynamic: int = 0,
    ) -> None:
        self.weights, self.progress = weights, progress
        self.dynamic = dynamic  # inputs that share a scale where the plugin's products round them, or 0
        self.rounding: dict[str, Equation] = {}  # how codes of activations were made
        self.made: dict[str, Equation] = {}  # weights by what unpacks them from codes
        self.scope: dict[str, ov.Output | Stored] = {}
        self.parameters: list[ov.op.Parameter] = []
        self.extra: list[tuple[str, ov.Output]] = []
        self.index: int | None = None
        self._memo: dict[Hashable, ov.Output] = {}
        self._alive: list[object] = []  # constants share their memory, and the memo goes by identity
        self._named: set[str] = set()

    # -- values -------------------------------------------------------------------------------------------------------

    def node(self, arg: Arg, dtype: str = "f32") -> ov.Output:
        """An operand in its held type; a literal becomes a scalar of `dtype`."""
        if not isinstance(arg, Value):
            return self.scalar(arg, dtype)
        value = self.scope[arg.name]
        if not isinstance(value, Stored):
            return value
        return self.widened(self.constant(value), value.type)

    def constant(self, value: Stored) -> ov.Output:
        """A stored value in the type that it is stored in, written once."""

        def make() -> ov.Output:
            tensor = value.tensor.detach().contiguous()
            self._alive += [value, tensor]
            node = constant(tensor, value.type.dtype)
            self.name(node, value.name)
            return node.output(0)

        return self.memo(("constant", id(value)), make)

    def widened(self, output: ov.Output, kind: TensorType) -> ov.Output:
        """The output in the type in which values of `kind` are held."""
        held = HELD[kind.dtype]
        if output.get_element_type() == element(held):
            return output
        return self.memo(("held", *identity(output)), lambda: ops.convert(output, element(held)).output(0))

    def scalar(self, number: float | int | bool | None, dtype: str = "f32") -> ov.Output:
        """A scalar constant in the held type of `dtype`."""
        assert number is not None  # optional operands are looked at before
        return self.memo(
            ("scalar", repr(number), HELD[dtype]), lambda: ops.constant(number, dtype=element(HELD[dtype])).output(0)
        )

    def memo(self, key: Hashable, make: Callable[[], ov.Output]) -> ov.Output:
        """What `make` gave when this key was first asked for: tables and masks are shared between layers."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def parameter(self, name: str, kind: TensorType) -> ov.Output:
        """An input port, its symbolic dims dynamic, once for each name."""

        def make() -> ov.Output:
            shape = ov.PartialShape([size if isinstance(size, int) else -1 for size in kind.shape])
            port = ov.op.Parameter(element(TYPES[kind.dtype]), shape)
            port.set_friendly_name(name)
            port.output(0).set_names({name})
            self.parameters.append(port)
            return port.output(0)

        # by type too: a state named like an input becomes a second port, and ov.Model refuses two ports of one name
        return self.memo(("parameter", name, kind), make)

    def name(self, node: ov.Node, name: str) -> None:
        """Give a node a friendly name that no other has."""
        unique, number = name, 1
        while unique in self._named:
            number += 1
            unique = f"{name}.{number}"
        self._named.add(unique)
        node.set_friendly_name(unique)

    # -- equations ----------------------------------------------------------------------------------------------------

    def run(self, equations: tuple[Equation, ...]) -> None:
        """Write equations in order into the scope."""
        for equation in equations:
            if equation.op == "repeat":
                self.repeat(equation)
            else:
                self.scope[equation.result.name] = self.equation(equation)

    def equation(self, equation: Equation) -> ov.Output | Stored:
        kind = equation.result.type
        if equation.op == "weight":
            name = stored_name(str(equation.attr["name"]), self.index)
            return stored_weight(self.weights(name), kind, name)
        if equation.op == "const":
            return Stored(ir_value(equation.attr["value"], kind), kind, equation.result.name)
        if equation.op == "state":
            return self.parameter(stored_name(str(equation.attr["name"]), self.index), kind)
        operands = [self.scope[arg.name] if isinstance(arg, Value) else arg for arg in equation.args]
        known = [isinstance(operand, Stored) for operand in operands if not isinstance(operand, (int, float))]
        stays = REGISTRY[equation.op].effect or (equation.op == "dequantize" and not ragged(equation))
        if known and all(known) and not stays:
            return evaluate(equation, operands)
        output = EMISSIONS[equation.op](self, equation)
        node = output.get_node()
        if node.get_friendly_name() == node.get_name():  # not an operand handed through
            self.name(node, self.label(equation))
        return output

    def label(self, equation: Equation) -> str:
        """`attn.qkv[3] @ model.yaml:45`: the value's name as the interpreter traces it, and where the spec says so."""
        name = equation.result.name if self.index is None else f"{equation.result.name}[{self.index}]"
        where = equation.where
        return name if where is None else f"{name} @ {where.file.rsplit('/', 1)[-1]}:{where.line}"

    def repeat(self, equation: Equation) -> None:
        body = equation.body
        assert body is not None  # C9
        carried = [self.scope[value.name] for value in equation.values]
        outer, count = self.scope, rounds(equation)
        for index in range(count):
            if self.progress is not None:
                self.progress("layers", index, count)
            self.scope, self.index = dict(outer), index
            self.scope.update(zip((value.name for value in body.params), carried, strict=True))
            self.run(body.equations)
            carried = [self.scope[value.name] for value in body.results]
        self.scope, self.index = outer, None
        self.scope.update(zip((value.name for value in equation.results), carried, strict=True))
        if self.progress is not None:
            self.progress("layers", count, count)


def element(name: str) -> ov.Type:
    """OpenVINO's element type of this name."""
    return getattr(ov.Type, name)


def identity(output: ov.Output) -> tuple[str, int]:
    """A key for an output: nodes have unique names."""
    return (str(output.get_node().get_name()), int(output.get_index()))
