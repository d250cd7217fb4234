"""The reference meaning of a graph: runs it equation by equation in PyTorch. The oracle of every test."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch

from compiler.ir.core import Equation, Graph, Value
from compiler.ir.names import expand
from compiler.ir.ops import REGISTRY
from compiler.ir.types import TensorType
from specs.errors import SpecRTError

_TORCH = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f8e4m3": torch.float8_e4m3fn,
    "i64": torch.int64,
    "i32": torch.int32,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
    "f8e8m0": torch.float8_e8m0fnu,
    # Half bytes are held one to a tensor element, E2M1 in E4M3, which has all of its values (formats.py packs them).
    "i4": torch.int8,
    "u4": torch.uint8,
    "f4e2m1": torch.float8_e4m3fn,
}
Weights = Callable[[str], torch.Tensor]
Trace = Callable[[str, torch.Tensor], None]


def torch_dtype(dtype: str) -> torch.dtype:
    """The PyTorch type of an IR element type; raises SpecRTError IR-004 where it has none."""
    if dtype not in _TORCH:
        raise SpecRTError("IR-004", f"the reference interpreter has no `{dtype}`; it has {', '.join(_TORCH)}")
    return _TORCH[dtype]


def ir_dtype(dtype: torch.dtype) -> str:
    """The IR name of a PyTorch element type."""
    return next(name for name, known in _TORCH.items() if known == dtype)


def run(
    graph: Graph,
    inputs: Mapping[str, torch.Tensor],
    weights: Weights,
    states: MutableMapping[str, torch.Tensor] | None = None,
    trace: Trace | None = None,
) -> dict[str, torch.Tensor]:
    """The outputs by name.

    `weights(name)` gives a weight in any float type; it is cast to the type that the graph states. `states` holds
    buffers by name and is changed in place. `trace(name, tensor)` sees every value, in `repeat` as `name[round]`.
    Raises SpecRTError IR-004 where an input is missing or misshaped.
    """
    runner = Runner(weights, {} if states is None else states, trace)
    scope: dict[str, torch.Tensor] = {}
    for value in graph.inputs:
        if value.name not in inputs:
            raise SpecRTError("IR-004", f"input `{value.name}` is missing")
        scope[value.name] = runner.bind(value, inputs[value.name])
    with torch.no_grad():
        runner.block(graph.equations, scope, None)
    return {name: scope[value.name] for name, value in graph.outputs}


class Runner:
    """Runs equations one by one, for those who look between them; `run` is all of it."""

    def __init__(self, weights: Weights, states: MutableMapping[str, torch.Tensor], trace: Trace | None) -> None:
        self.weights, self.states, self.trace = weights, states, trace
        self.dims: dict[str, int] = {}

    def bind(self, value: Value, tensor: torch.Tensor) -> torch.Tensor:
        expected = value.type
        fits = tensor.ndim == expected.rank and tensor.dtype == torch_dtype(expected.dtype)
        for dim, size in zip(expected.shape, tensor.shape, strict=False):
            known = dim if isinstance(dim, int) else self.dims.setdefault(dim, int(size))
            fits = fits and known == size
        if not fits:
            got = f"{ir_dtype(tensor.dtype)}[{','.join(str(size) for size in tensor.shape)}]"
            known_dims = ", ".join(f"{name}={size}" for name, size in self.dims.items())
            raise SpecRTError("IR-004", f"input `{value.name}` must be {expected} ({known_dims}), got {got}")
        return tensor

    def sizes(self, shape: Any) -> tuple[int, ...]:
        return tuple(self.dims[dim] if isinstance(dim, str) else dim for dim in shape)

    def block(self, equations: tuple[Equation, ...], scope: dict[str, torch.Tensor], index: int | None) -> None:
        for equation in equations:
            results = self.equation(equation, scope, index)
            for value, tensor in zip(equation.results, results, strict=True):
                scope[value.name] = tensor
                if self.trace is not None:
                    self.trace(value.name if index is None else f"{value.name}[{index}]", tensor)

    def equation(
        self, equation: Equation, scope: dict[str, torch.Tensor], index: int | None
    ) -> tuple[torch.Tensor, ...]:
        if equation.op == "repeat":
            return self.repeat(equation, scope)
        if equation.op in ("weight", "state"):
            name = str(equation.attr["name"])
            name = name if index is None else expand(name, index)
            return (self.weight(name, equation.result.type) if equation.op == "weight" else self.state(name, equation),)
        attrs = dict(equation.attr)
        if equation.op == "const":
            return (torch.tensor(attrs["value"], dtype=torch_dtype(equation.result.type.dtype)),)
        if equation.op == "reshape":
            attrs["shape"] = self.sizes(attrs["shape"])
        args = (scope[arg.name] if isinstance(arg, Value) else arg for arg in equation.args)
        return (REGISTRY[equation.op].body(*args, **attrs),)

    def weight(self, name: str, expected: TensorType) -> torch.Tensor:
        tensor = self.weights(name)
        if tuple(tensor.shape) != expected.static_shape():
            raise SpecRTError("IR-004", f"weight `{name}` must be {expected}, got {list(tensor.shape)}")
        return tensor.to(torch_dtype(expected.dtype))

    def state(self, name: str, equation: Equation) -> torch.Tensor:
        if name not in self.states:
            kind = equation.result.type
            self.states[name] = torch.zeros(self.sizes(kind.shape), dtype=torch_dtype(kind.dtype))
        return self.states[name]

    def repeat(self, equation: Equation, scope: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        body = equation.body
        assert body is not None  # C9
        carried = tuple(scope[value.name] for value in equation.values)
        count = equation.attr["count"]
        assert isinstance(count, int)  # C4
        for index in range(count):
            inner = dict(scope)
            inner.update(zip((value.name for value in body.params), carried, strict=True))
            self.block(body.equations, inner, index)
            carried = tuple(inner[value.name] for value in body.results)
        return carried
