"""A GPU and a TensorRT that are none: memory is the host's, and an engine is a recorded network, computed in place.

What is called of TensorRT is held to the recorded API of its version, addresses and shapes to what was built.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.tensorrt import recorder
from tests.tensorrt.recorder.api import Api, Guarded, api
from tests.tensorrt.recorder.semantics import TORCH

GPU = "none"


class Device:
    """runtime.cuda.driver.Device over host memory, with a guard behind each piece."""

    capability, multiprocessors, stream = 90, 4, 0
    free_memory = 10**9
    name = GPU

    def __init__(self, _ordinal: int = 0) -> None:
        self.pieces: dict[int, np.ndarray[Any, Any]] = {}

    def use(self) -> None:
        pass

    wait = use

    def close(self) -> None:
        for address, piece in self.pieces.items():
            assert (piece[-256:] == 0xA5).all(), f"written behind {address:#x}"
        self.pieces.clear()

    def allocate(self, size: int) -> int:
        piece = np.full(size + 256, 0xFF, np.uint8)  # NaN in every float, until it is written
        piece[size:] = 0xA5
        self.pieces[piece.ctypes.data] = piece
        return piece.ctypes.data

    def pinned(self, size: int) -> np.ndarray[Any, Any]:
        return np.zeros(size, np.uint8)

    def clear(self, address: int, size: int) -> None:
        ctypes.memset(address, 0, size)

    def upload(self, target: int, source: np.ndarray[Any, Any], size: int | None = None) -> None:
        ctypes.memmove(target, source.ctypes.data, source.nbytes if size is None else size)

    def download(self, target: np.ndarray[Any, Any], source: int) -> None:
        ctypes.memmove(target.ctypes.data, source, target.nbytes)

    def event(self) -> object:
        return object()

    def passed(self, event: object) -> None:
        pass

    def function(self, _file: Path, entry: str, _shared: int) -> str:
        return entry

    def launch(self, function: str, grid: Sequence[int], _threads: int, _shared: int, values: Sequence[int]) -> None:
        """The one kernel that a native bundle has: the likeliest token of each row of float32 logits."""
        assert function.startswith("choose")
        logits, tokens, *_ = values
        vocab = int(function.partition("-")[2])
        rows = view(logits, (grid[0], vocab), torch.float32)
        view(tokens, (grid[0],), torch.int32).copy_(rows.argmax(-1))


def view(address: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory as a tensor, where it lies."""
    size = int(np.prod(shape)) * dtype.itemsize
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=dtype).reshape(tuple(shape))


class Context(Guarded):
    """IExecutionContext: shapes within the profile, an address for every tensor, a cache at one address."""

    def __init__(self, known: Api, engine: Engine) -> None:
        super().__init__(known, "IExecutionContext")
        self._engine, self._profile = engine, 0
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_device_memory(self, _memory: int, size: int) -> None:
        assert size == self._engine.device_memory_size_v2

    def set_optimization_profile_async(self, index: int, _stream: int) -> bool:
        self._profile = index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self._engine._profiles[self._profile][name]
        self._shapes[name] = shape
        return all(a <= dim <= b for a, dim, b in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self._engine._names
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, _stream: int) -> bool:
        network = self._engine._network
        given = {}
        for tensor in network._inputs:
            shape = self._shapes.get(tensor.name, tensor._shape)
            given[tensor.name] = view(self._addresses[tensor.name], shape, TORCH[tensor._kind])
        for name, result in network.evaluate(given).items():
            source = self._engine.get_aliased_input_tensor(name)
            if source is None:
                view(self._addresses[name], result.shape, result.dtype).copy_(result)
            else:
                assert self._addresses[name] == self._addresses[source] == result.data_ptr()
        return True


class Engine(Guarded):
    """ICudaEngine of a recorded network and the configuration that it was built with."""

    def __init__(self, known: Api, network: Any, config: Any) -> None:
        super().__init__(known, "ICudaEngine")
        self._network = network
        self._profiles = [profile._shapes for profile in config._profiles]
        self._names = [tensor.name for tensor in (*network._inputs, *network._outputs)]
        self._state.update(
            num_io_tensors=len(self._names), device_memory_size_v2=512, num_optimization_profiles=len(self._profiles)
        )

    def get_tensor_name(self, index: int) -> str:
        return str(self._names[index])

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._api.enums["TensorIOMode"]
        return modes["INPUT"] if any(tensor.name == name for tensor in self._network._inputs) else modes["OUTPUT"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return next(tensor._shape for tensor in self._network._inputs if tensor.name == name)

    def get_aliased_input_tensor(self, name: str) -> str | None:
        layer = next(tensor._source for tensor in self._network._outputs if tensor.name == name)
        return layer._inputs[0].name if layer._kind == "add_kv_cache_update" else None

    def create_execution_context(self, strategy: Any) -> Context:
        assert strategy.name == "USER_MANAGED"
        return Context(self._api, self)


def tensorrt(version: str) -> Any:
    """The module, for building and for running what was built with it."""
    known, trt = api(version), recorder.module(version)
    builder = recorder.Builder(known, None)
    trt.Builder = lambda _: builder
    trt.ILogger = type("ILogger", (), {"__init__": lambda *_: None, **dict.fromkeys(("INTERNAL_ERROR", "ERROR"), 1),
                                       **dict.fromkeys(("WARNING", "INFO"), 2)})  # fmt: skip
    trt.Runtime = lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _: Engine(known, *builder._built[-1]))
    return trt


def install(monkeypatch: pytest.MonkeyPatch, trt: Any) -> Callable[[], None]:
    """Put both in the place of the real ones, for what is imported from now on."""
    for name in [name for name in sys.modules if name.startswith("runtime.cuda.")]:
        monkeypatch.delitem(sys.modules, name)
    module = ModuleType("tensorrt")
    module.__dict__.update(vars(trt))
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    bindings = ModuleType("cuda.bindings")
    bindings.driver = SimpleNamespace()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    import runtime.cuda.native

    monkeypatch.setattr(runtime.cuda.native, "Device", Device)

    def forget() -> None:
        for name in [name for name in sys.modules if name.startswith("runtime.cuda.")]:
            del sys.modules[name]

    return forget
