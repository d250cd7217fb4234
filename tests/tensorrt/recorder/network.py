"""Networks, layers and tensors as recorded, and their evaluation."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from compiler.ir.formats import unpack
from tests.tensorrt.recorder import quantization, semantics  # noqa: F401 (quantization registers its layers)
from tests.tensorrt.recorder.api import Api, Guarded
from tests.tensorrt.recorder.semantics import NAMES, TORCH, check_types

HALF_BYTES = {"INT4": "i4", "FP4": "f4e2m1"}  # two in a byte; the IR's name


class Logger:
    """tensorrt.ILogger; severities by name."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)
    Severity = None

    def __init__(self, *_: Any) -> None:
        pass


class Weights:
    """Constant data with its type."""

    def __init__(self, tensor: torch.Tensor, kind: str) -> None:
        self.tensor, self.kind = tensor, kind


def make_weights(api: Api, *args: Any) -> Weights:
    """trt.Weights of an array, or of a type, an address and a count (from 10.0 on)."""
    api.check_call("Weights", "__init__", len(args))
    if len(args) == 1:
        assert isinstance(args[0], np.ndarray), f"Weights of {type(args[0])}"
        tensor = torch.from_numpy(args[0].copy())
        return Weights(tensor, NAMES[tensor.dtype])
    kind, address, count = args
    dtype = TORCH[kind.name]
    raw = bytearray(ctypes.string_at(address, -(-count // 2) if kind.name in HALF_BYTES else count * dtype.itemsize))
    if kind.name in HALF_BYTES:
        packed = torch.frombuffer(raw, dtype=torch.uint8)
        return Weights(unpack(packed, HALF_BYTES[kind.name])[:count].clone(), kind.name)
    return Weights(torch.frombuffer(raw, dtype=dtype).clone(), kind.name)


class Tensor(Guarded):
    """ITensor: `_source` is the layer that makes it, None for an input."""

    _hidden = frozenset({"set_dimension_name"})

    def __init__(self, api: Api, source: Layer | None, kind: str, rank: int, shape: tuple[int, ...] | None) -> None:
        super().__init__(api, "ITensor")
        self._source, self._kind, self._rank, self._shape = source, kind, rank, shape
        self._dims: dict[int, str] = {}
        self._state.update(name="", dtype=api.enums["DataType"][kind], allowed_formats=None, shape=shape)

    def set_dimension_name(self, index: int, name: str) -> None:
        self._api.check_call("ITensor", "set_dimension_name", 2)
        self._dims[index] = name


class Layer(Guarded):
    """A layer: what it reads, its parameters, the types that were set, its outputs."""

    def __init__(
        self, network: Network, owner: str, kind: str, inputs: Sequence[Tensor], params: dict[str, Any]
    ) -> None:
        super().__init__(network._api, owner)
        self._network, self._kind, self._params = network, kind, params
        self._inputs: list[Any] = list(inputs)  # None where an optional one is left out
        self._set_types: dict[int, str] = {}
        self._state.update(name="", num_elementwise_dims=0)
        if owner == "IAttention":
            self._state.update(decomposable=False)
        if "precision" in self._api.classes[owner]:
            self._state.update(precision=None)
        for tensor in inputs:
            assert isinstance(tensor, Tensor), f"{kind} of {type(tensor)}"
        made = check_types(self)
        self._outputs = [Tensor(network._api, self, dtype, rank, self._length()) for dtype, rank in made]
        network._layers.append(self)

    def _length(self) -> tuple[int, ...] | None:
        """The shape of the output where that is known when it is recorded, as for shapes as tensors."""
        if self._kind == "add_constant":
            return tuple(self._params["data"].shape)
        if self._kind == "add_shape":
            return (self._inputs[0]._rank,)
        if self._kind == "add_slice" and self._inputs[0]._rank == 1:
            return tuple(self._params["shape"])
        if self._kind == "add_concatenation" and self._inputs[0]._rank == 1:
            return (sum(tensor._shape[0] for tensor in self._inputs),)
        return None

    @property
    def _output(self) -> Tensor:
        return self._outputs[0]

    def get_output(self, index: int) -> Tensor:
        return self._outputs[index]

    def set_input(self, index: int, tensor: Tensor) -> bool:
        self._inputs += [None] * (index + 1 - len(self._inputs))
        self._inputs[index] = tensor
        if self._kind == "add_shuffle" and index == 1:
            self._output._rank = tensor._shape[0]
        return True

    def set_output_type(self, index: int, dtype: Any) -> None:
        assert not self._network._strong, "set_output_type in a strongly typed network"
        self._set_types[index] = dtype.name

    def __setattr__(self, name: str, value: Any) -> None:
        assert name != "precision" or not self._network._strong, "precision in a strongly typed network"
        super().__setattr__(name, value)
        if name == "reshape_dims":
            self._output._rank = len(value)
        if name == "mask":
            self.set_input(3, value)
            check_types(self)
        if name == "num_elementwise_dims":
            self._output._rank -= value


class Network(Guarded):
    """INetworkDefinition: every `add_*` of the recorded API that the recorder has semantics for."""

    _hidden = frozenset({"evaluate", "finish"})

    def __init__(self, api: Api, flags: int) -> None:
        super().__init__(api, "INetworkDefinition")
        names = api.enums["NetworkDefinitionCreationFlag"]
        strong = names.__members__.get("STRONGLY_TYPED")
        self._strong = api.strong_only or (strong is not None and bool(flags >> strong & 1))
        if "EXPLICIT_BATCH" in names.__members__ and api.version.startswith("8."):
            assert flags >> names["EXPLICIT_BATCH"] & 1, "8.6 needs EXPLICIT_BATCH"
        self._layers: list[Layer] = []
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("add_") or name in ("add_input", "add_constant"):
            return super().__getattribute__(name)
        api = object.__getattribute__(self, "_api")
        variants = api.classes["INetworkDefinition"].get(name)
        if variants is None:
            raise AttributeError(f"TensorRT {api.version}: INetworkDefinition has no `{name}`")
        if name not in semantics.LAYERS:
            raise NotImplementedError(f"the recorder does not know {name}")

        def add(*args: Any) -> Layer:
            owner = api.check_call("INetworkDefinition", name, len(args))
            parameters = next(names for names, _ in variants if len(names) >= len(args))
            given = dict(zip((parameter.rstrip("?") for parameter in parameters), args, strict=False))
            inputs: list[Tensor] = []
            for value in given.values():
                inputs += [value] if isinstance(value, Tensor) else value if isinstance(value, list) else []
            params = {key: value for key, value in given.items() if not isinstance(value, (Tensor, list))}
            return Layer(self, owner, name, inputs, params)

        return add

    def add_input(self, name: str, dtype: Any, shape: Sequence[int]) -> Tensor:
        assert name not in {tensor.name for tensor in self._inputs}, f"two inputs `{name}`"
        tensor = Tensor(self._api, None, dtype.name, len(shape), tuple(shape))
        tensor.name = name
        self._inputs.append(tensor)
        return tensor

    def add_constant(self, shape: Sequence[int], weights: Weights) -> Layer:
        data = weights.tensor.reshape(tuple(shape))
        owner = self._api.check_call("INetworkDefinition", "add_constant", 2)
        return Layer(self, owner, "add_constant", [], {"data": data, "kind": weights.kind})

    def mark_output(self, tensor: Tensor) -> None:
        assert tensor._source is not None, f"output `{tensor.name}` is an input"
        assert not any(tensor is other for other in self._outputs), "one tensor is two outputs"
        self._outputs.append(tensor)

    def finish(self) -> None:
        """What a builder checks before it builds: names, outputs, and in a weakly typed network that all is said."""
        names = [tensor.name for tensor in (*self._inputs, *self._outputs)]
        assert len(set(names)) == len(names), f"two ports of one name: {names}"
        layer_names = [layer.name for layer in self._layers]
        assert len(set(layer_names)) == len(layer_names), "two layers of one name"
        assert all(layer_names), "a layer without a name"
        for layer in self._layers:
            if layer._kind == "add_kv_cache_update":
                assert any(layer._output is tensor for tensor in self._outputs), f"{layer.name}: must be an output"
                readers = [other.name for other in self._layers if layer._inputs[0] in other._inputs]
                assert readers == [layer.name], f"{readers} read a cache from before its update"
        if self._strong:
            return
        used = {id(tensor) for reader in self._layers for tensor in reader._inputs}
        used |= {id(tensor) for tensor in self._outputs}
        for layer in self._layers:
            if layer._kind == "add_constant" or layer._output._kind == "BOOL":
                continue
            for index, name in layer._set_types.items():
                output = layer._outputs[index]._kind
                assert name == output, f"{layer.name}: makes {output}, told {name}"
            for index, tensor in enumerate(layer._outputs):
                assert index in layer._set_types or id(tensor) not in used, (
                    f"{layer.name}: makes {tensor._kind}, told None"
                )
            floats = {tensor._kind for tensor in layer._inputs if tensor is not None} & {"FLOAT", "HALF", "BF16"}
            if floats and layer._kind not in ("add_cast", "add_shape", "add_dequantize"):
                precision = layer.precision.name if layer.precision is not None else None
                if all(tensor is not None and _is_code(tensor) for tensor in layer._inputs):
                    assert precision is None, f"{layer.name}: a product of codes, told {precision}"
                else:
                    assert floats == {precision}, f"{layer.name}: computes {floats}, told {precision}"
        for tensor in self._outputs:
            assert tensor.dtype.name == tensor._kind, (
                f"output `{tensor.name}` is {tensor._kind}, said {tensor.dtype.name}"
            )

    def evaluate(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs by name, every layer computed as PyTorch does in the layer's type."""
        values: dict[int, torch.Tensor] = {}
        dims: dict[str, int] = {}
        for tensor in self._inputs:
            given = inputs[tensor.name]
            assert TORCH[tensor._kind] == given.dtype, f"input `{tensor.name}` is {tensor._kind}, got {given.dtype}"
            assert given.ndim == tensor._rank, f"input `{tensor.name}` has rank {tensor._rank}, got {list(given.shape)}"
            for axis, (size, wanted) in enumerate(zip(given.shape, tensor._shape, strict=True)):
                known = (
                    dims.setdefault(tensor._dims.get(axis, f"{tensor.name}.{axis}"), size) if wanted == -1 else wanted
                )
                assert size == known, f"input `{tensor.name}`: dim {axis} is {size}, expected {known}"
            values[id(tensor)] = given
        for layer in self._ordered():
            arguments = [None if tensor is None else values[id(tensor)] for tensor in layer._inputs]
            evaluate: Callable[..., Any] = semantics.LAYERS[layer._kind][1]
            try:
                result = evaluate(layer, *arguments)
            except (AssertionError, RuntimeError, IndexError) as error:
                raise AssertionError(f"layer `{layer.name}` ({layer._kind}): {error}") from error
            results = result if isinstance(result, tuple) else (result,)
            for output, tensor in zip(layer._outputs, results, strict=True):
                assert TORCH[output._kind] == tensor.dtype, (
                    f"{layer.name} makes {tensor.dtype}, recorded {output._kind}"
                )
                assert tensor.ndim == output._rank, f"{layer.name}: rank {tensor.ndim}, recorded {output._rank}"
                values[id(output)] = tensor
        return {tensor.name: values[id(tensor)] for tensor in self._outputs}

    def _ordered(self) -> list[Layer]:
        """Layers after those that they read, also where an input was set late."""
        order: dict[int, Layer] = {}

        def visit(layer: Layer) -> None:
            if id(layer) in order:
                return
            for tensor in layer._inputs:
                if tensor is not None and tensor._source is not None:
                    visit(tensor._source)
            order[id(layer)] = layer

        for layer in self._layers:
            visit(layer)
        return list(order.values())


def _is_code(tensor: Tensor) -> bool:
    return tensor._source is not None and tensor._source._kind == "add_dequantize"


class Profile(Guarded):
    """IOptimizationProfile."""

    _hidden = frozenset({"shapes"})

    def __init__(self, api: Api) -> None:
        super().__init__(api, "IOptimizationProfile")
        self._shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, name: str, low: Sequence[int], best: Sequence[int], high: Sequence[int]) -> None:
        assert all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)), f"{name}: {low} {best} {high}"
        self._shapes[name] = (tuple(low), tuple(best), tuple(high))


class Config(Guarded):
    """IBuilderConfig: flags, limits and profiles are kept."""

    def __init__(self, api: Api) -> None:
        super().__init__(api, "IBuilderConfig")
        self._flags: set[str] = set()
        self._features: set[str] = set()
        self._profiles: list[Profile] = []
        self._limits: dict[str, int] = {}

    def set_flag(self, flag: Any) -> None:
        self._flags.add(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag.name)

    def set_preview_feature(self, feature: Any, value: bool) -> None:
        if value:
            self._features.add(feature.name)

    def set_memory_pool_limit(self, pool: Any, size: int) -> None:
        self._limits[pool.name] = size

    def set_tactic_sources(self, sources: int) -> bool:
        self._state["tactic_sources"] = sources
        return True

    def add_optimization_profile(self, profile: Profile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self._state["timing_cache"] = (cache, ignore_mismatch)
        return True

    def get_timing_cache(self) -> Any:
        return _Serialized(b"timing cache")


class _Serialized:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data


class Builder(Guarded):
    """Builder: makes recorded networks; a build gives bytes that hold nothing, or None where the test says so."""

    _hidden = frozenset({"network", "config", "fails"})

    def __init__(self, api: Api, logger: Any) -> None:
        super().__init__(api, "Builder")
        self._logger = logger
        self._built: list[tuple[Network, Config]] = []

    def create_network(self, flags: int = 0) -> Network:
        return Network(self._api, flags)

    def create_builder_config(self) -> Config:
        return Config(self._api)

    def create_optimization_profile(self) -> Profile:
        return Profile(self._api)

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        network.finish()
        self._built.append((network, config))
        return b"plan"
