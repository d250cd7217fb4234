"""Writes equations into a TensorRT network: what each value became, and the few layers that everything is made of.

Strong typing is how the lowering thinks: operands of one layer have one type, casts are layers. Version 8.6 has no such
mode; there every layer is told its precision and the type of its result, and the builder is told to obey.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from compiler.ir.core import Arg, AttrValue, Equation, Value
from compiler.ir.types import Shape, TensorType
from compiler.lower.tensorrt.dialects import DATA_TYPES, Dialect
from specs.errors import SpecRTError, Where

if TYPE_CHECKING:
    from compiler.lower.tensorrt.quantized import Outlook

Tensor = Any  # trt.ITensor
Emission = Callable[["Emitter", Equation], Tensor]
EMISSIONS: dict[str, Emission] = {}
_FLOATS = ("f32", "f16", "bf16")
_NUMPY = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "i64": np.int64, "i8": np.int8, "bool": np.bool_}
# A weight by name; what numpy has no type for as its bits: bf16 uint16, 8-bit floats uint8, half bytes two in a uint8.
Baked = Callable[[str], "np.ndarray[Any, Any]"]
_BITS = ("bf16", "f8e4m3", "i4", "f4e2m1", "f8e8m0")


@dataclass(frozen=True)
class Operand:
    """A dequantized value that only products read: its codes and their scale."""

    codes: Value
    scale: Value


def emits(*names: str) -> Callable[[Emission], Emission]:
    """Register how operations of these names are written."""

    def register(emission: Emission) -> Emission:
        EMISSIONS.update(dict.fromkeys(names, emission))
        return emission

    return register


class Emitter:
    """One network being written with the module `trt`, the real one or a recorder."""

    def __init__(
        self, trt: Any, network: Any, dialect: Dialect, baked: Baked | None, outlook: Outlook, native: bool
    ) -> None:
        self.trt, self.network, self.dialect, self.baked = trt, network, dialect, baked
        self.native = native  # attention by TensorRT's own layer
        self.outlook = outlook
        self.operands: dict[str, Operand] = {}  # of products only, in place of a tensor in the scope
        self.constants: set[str] = set()  # values that are known when the engine is built
        self.scope: dict[str, Tensor] = {}
        self.places: dict[str, Where] = {}  # of layers, by name
        self.alive: list[Any] = []  # arrays that the network points into until it is built
        self.inputs: dict[str, tuple[Tensor, int]] = {}  # a symbolic dim -> an input and its axis that has it
        self._label, self.where = "", None  # type: tuple[str, Where | None]
        self._memo: dict[Hashable, Tensor] = {}
        self._named: dict[str, int] = {}

    # -- values -------------------------------------------------------------------------------------------------------

    def input(self, value: Value) -> None:
        """Add an input port of the value's name; symbolic dims are dynamic."""
        shape = tuple(-1 if isinstance(dim, str) else dim for dim in value.type.shape)
        tensor = self.network.add_input(value.name, self.type(value.type.dtype), shape)
        for axis, dim in enumerate(value.type.shape):
            if isinstance(dim, str):
                tensor.set_dimension_name(axis, dim)
                self.inputs.setdefault(dim, (tensor, axis))
        self.scope[value.name] = tensor

    def tensor(self, arg: Arg, like: TensorType | None = None) -> Tensor:
        """An operand; a literal becomes a constant of the type and rank of `like`."""
        if isinstance(arg, Value):
            return self.scope[arg.name]
        assert like is not None  # operations that take literals say what beside
        assert arg is not None
        return self.scalar(arg, like.dtype, like.rank)

    def scalar(self, number: float | int | bool, dtype: str, rank: int) -> Tensor:
        """A constant of one element and any rank."""
        key = ("scalar", repr(number), dtype, rank)
        return self.memo(key, lambda: self.constant(np.full((1,) * rank, number), dtype))

    def constant(self, array: Any, dtype: str) -> Tensor:
        """An array as a constant of an IR type; bf16 and bool are cast from types that every version takes."""
        held = {"bf16": "f32", "bool": "i32"}.get(dtype, dtype)
        data: np.ndarray[Any, Any] = np.ascontiguousarray(array, dtype=_NUMPY[held])
        self.alive.append(data)
        weights = self.trt.Weights(data) if data.ndim else self.trt.Weights(data.reshape(1))
        layer = self.named(self.network.add_constant(data.shape, weights), "const")
        return self.cast(layer.get_output(0), held, dtype)

    def const(self, value: AttrValue, kind: TensorType) -> Tensor:
        """The IR's constant."""
        return self.constant(np.array(value, dtype=np.float64 if kind.is_float else np.int64), kind.dtype)

    def memo(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gave when this key was first asked for."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def type(self, dtype: str) -> Any:
        """TensorRT's type of an IR type; raises SpecRTError LOWER-031 where the version has none."""
        if dtype not in self.dialect.dtypes:
            raise SpecRTError("LOWER-031", f"TensorRT {self.dialect.version} has no `{dtype}`", where=self.where)
        return getattr(self.trt.DataType, DATA_TYPES[dtype])

    # -- layers -------------------------------------------------------------------------------------------------------

    def named(self, layer: Any, what: str = "") -> Any:
        """Name a layer after the equation that it is for: `mlp.up @ model.yaml:38`, helpers `mlp.up/cast @ ...`."""
        if layer is None:
            message = f"TensorRT refuses a layer of `{self._label}`{f' ({what})' if what else ''}"
            raise SpecRTError("LOWER-032", message, where=self.where, hint="its log above says why")
        head = f"{self._label}/{what}" if what else self._label
        number = self._named[head] = self._named.get(head, 0) + 1
        where = self.where
        place = "" if where is None else f" @ {where.file.rsplit('/', 1)[-1]}:{where.line}"
        layer.name = f"{head if number == 1 else f'{head}#{number}'}{place}"
        if where is not None:
            self.places[layer.name] = where
        return layer

    def out(self, layer: Any, dtype: str, what: str = "", *, compute: str | None = None, index: int = 0) -> Tensor:
        """A layer's result of type `dtype`, computed in `compute` (the same): told to a weakly typed network."""
        layer = self.named(layer, what)
        if not self.dialect.strong and dtype != "bool":  # comparisons give BOOL and nothing else
            if (compute or dtype) in _FLOATS:
                layer.precision = self.type(compute or dtype)
            layer.set_output_type(index, self.type(dtype))
        return layer.get_output(index)

    def cast(self, x: Tensor, source: str, target: str) -> Tensor:
        """x in another type."""
        if source == target:
            return x
        layer = self.network.add_cast(x, self.type(target))
        return self.out(layer, target, "cast", compute="none")

    def elementwise(self, op: str, a: Tensor, b: Tensor, dtype: str, what: str = "", result: str = "") -> Tensor:
        """A binary operation on operands of one rank and of type `dtype`; `result` where that is another type."""
        layer = self.network.add_elementwise(a, b, getattr(self.trt.ElementWiseOperation, op))
        return self.out(layer, result or dtype, what, compute=dtype)

    def unary(self, op: str, x: Tensor, dtype: str, what: str = "") -> Tensor:
        """A unary operation."""
        return self.out(self.network.add_unary(x, getattr(self.trt.UnaryOperation, op)), dtype, what)

    def activation(self, op: str, x: Tensor, dtype: str, what: str = "") -> Tensor:
        """An activation."""
        return self.out(self.network.add_activation(x, getattr(self.trt.ActivationType, op)), dtype, what)

    def mean(self, x: Tensor, rank: int, dtype: str, what: str = "", op: str = "AVG") -> Tensor:
        """The mean (or another reduction) over the last dim, kept as 1."""
        layer = self.network.add_reduce(x, getattr(self.trt.ReduceOperation, op), 1 << (rank - 1), True)
        return self.out(layer, dtype, what)

    # -- shapes -------------------------------------------------------------------------------------------------------

    def size(self, dims: Shape) -> Tensor:
        """A shape with symbolic dims as a tensor."""
        return self.memo(("size", dims), lambda: self._size(dims))

    def _size(self, dims: Shape) -> Tensor:
        kind = self.dialect.shape_dtype
        parts = [self._dim(dim) for dim in dims]
        if len(parts) == 1:
            return parts[0]
        layer = self.network.add_concatenation(parts)
        layer.axis = 0
        return self.out(layer, kind, "shape", compute="none")

    def _dim(self, dim: int | str) -> Tensor:
        """One dim as a tensor of one number."""

        def make() -> Tensor:
            kind = self.dialect.shape_dtype
            if isinstance(dim, int):
                return self.constant([dim], kind)
            tensor, axis = self.inputs[dim]
            shape = self.out(self.network.add_shape(tensor), kind, "shape", compute="none")
            return self.out(self.network.add_slice(shape, (axis,), (1,), (1,)), kind, "dim", compute="none")

        return self.memo(("dim", dim), make)

    def reshape(self, x: Tensor, source: Shape, target: Shape, dtype: str, what: str = "") -> Tensor:
        """x under another shape: one symbolic dim is computed (-1), others copied (0) or read from the inputs."""
        if source == target:
            return x
        layer = self.network.add_shuffle(x)
        copied = {axis for axis, dim in enumerate(target) if isinstance(dim, str) and source[axis : axis + 1] == (dim,)}
        free = [axis for axis, dim in enumerate(target) if isinstance(dim, str) and axis not in copied]
        if len(free) > 1:
            layer.set_input(1, self.size(target))
        else:
            layer.reshape_dims = tuple(
                0 if axis in copied else -1 if isinstance(dim, str) else dim for axis, dim in enumerate(target)
            )
        return self.out(layer, dtype, what)

    def flat(self, x: Tensor, target: tuple[int, ...], dtype: str, what: str) -> Tensor:
        """x under a shape of known dims and one -1."""
        layer = self.network.add_shuffle(x)
        layer.reshape_dims = target
        return self.out(layer, dtype, what)

    def aligned(self, x: Tensor, shape: Shape, rank: int, dtype: str) -> Tensor:
        """x with leading dims of 1 up to `rank`, as broadcasting in TensorRT asks for."""
        if len(shape) == rank:
            return x
        target = (*(1,) * (rank - len(shape)), *shape)
        key = ("aligned", id(x), rank)
        return self.memo(key, lambda: self.reshape(x, shape, target, dtype, "aligned"))

    def slice(self, x: Tensor, shape: Shape, axis: int, start: int, stop: int, dtype: str, what: str = "") -> Tensor:
        """Elements start:stop of one axis (from the front)."""
        return self.strided(x, shape, axis, start, stop - start, 1, dtype, what)

    def strided(
        self, x: Tensor, shape: Shape, axis: int, start: int, count: int, step: int, dtype: str, what: str = ""
    ) -> Tensor:
        """`count` elements of one axis from `start`, every `step`th."""
        rank = len(shape)
        size = (*shape[:axis], count, *shape[axis + 1 :])
        begin = tuple(start if index == axis else 0 for index in range(rank))
        strides = tuple(step if index == axis else 1 for index in range(rank))
        known = tuple(dim if isinstance(dim, int) else 1 for dim in size)
        layer = self.network.add_slice(x, begin, known, strides)
        if any(isinstance(dim, str) for dim in size):
            layer.set_input(2, self.size(size))
        return self.out(layer, dtype, what)

    def concat(self, parts: list[Tensor], axis: int, dtype: str, what: str = "") -> Tensor:
        """Tensors one after the other along an axis (from the front)."""
        layer = self.network.add_concatenation(parts)
        layer.axis = axis
        return self.out(layer, dtype, what)

    # -- equations ----------------------------------------------------------------------------------------------------

    def run(self, equations: tuple[Equation, ...]) -> None:
        """Write equations in order into the scope."""
        for equation in equations:
            if equation.results[0].name in self.outlook.absorbed:
                continue
            self._label, self.where = equation.results[0].name, equation.where
            self.scope[equation.result.name] = self._equation(equation)

    def _equation(self, equation: Equation) -> Tensor:
        kind = equation.result.type
        if equation.op == "const":
            return self.const(equation.attr["value"], kind)
        if equation.op == "weight":
            self.constants.add(equation.result.name)
            return self._weight(str(equation.attr["name"]), kind)
        if equation.op not in EMISSIONS:
            raise AssertionError(f"`{equation.op}` in an engine's segment")  # the capability table is checked before
        return EMISSIONS[equation.op](self, equation)

    def _weight(self, name: str, kind: TensorType) -> Tensor:
        assert self.baked is not None  # with weights as inputs there are none left
        data = np.ascontiguousarray(self.baked(name))
        self.alive.append(data)
        if kind.dtype in _BITS:
            weights = self.trt.Weights(self.type(kind.dtype), data.ctypes.data, prod(kind.static_shape()))
        else:
            weights = self.trt.Weights(data)
        return self.named(self.network.add_constant(kind.static_shape(), weights)).get_output(0)


def attr_int(equation: Equation, name: str) -> int:
    """An attribute that is a whole number."""
    value = equation.attr[name]
    assert isinstance(value, int)  # C4
    return value


def attr_float(equation: Equation, name: str) -> float:
    """An attribute that is a number."""
    value = equation.attr[name]
    assert isinstance(value, (int, float))  # C4
    return float(value)
