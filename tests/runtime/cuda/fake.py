"""A TensorRT that is none, on the emulated GPU: an engine is a recorded network, computed in place.

What is called of it is held to the recorded API of its version, addresses and shapes to what was built.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from compiler.kernels import library
from compiler.lower.tensorrt.dialects import DATA_TYPES
from tests.runtime.cuda import emulated
from tests.tensorrt import recorder
from tests.tensorrt.recorder.api import Api, Guarded, api
from tests.tensorrt.recorder.semantics import NAMES

SCRATCH = 512
IR = {name: dtype for dtype, name in DATA_TYPES.items()}


class Device(emulated.Device):
    """The emulated GPU, which engines find: one at a time."""

    here: Device

    def __init__(self, ordinal: int = 0) -> None:
        super().__init__(ordinal)
        Device.here = self
        self.replayed = 0
        self.started: list[tuple[int, ...]] = []  # the shape of the tokens of each call that was not in a graph

    def capture(self, work: Callable[[], None]) -> list[Callable[[], None]]:
        """What `work` puts into the stream, with the addresses and sizes of now; it may not wait for any of it."""
        self.wait()
        work()
        graph, self.queue = self.queue, []
        assert graph
        return graph

    def replay(self, graph: list[Callable[[], None]]) -> None:
        self.replayed += 1
        self.queue += graph


def view(address: int, shape: Sequence[int], kind: str) -> torch.Tensor:
    """Memory as a tensor, where it lies."""
    return Device.here.tensor(address, IR[kind])[: int(np.prod(shape))].view(tuple(shape))


class Context(Guarded):
    """IExecutionContext: shapes within the profile, an address for every tensor, a cache at one address."""

    def __init__(self, known: Api, engine: Engine) -> None:
        super().__init__(known, "IExecutionContext")
        self._engine, self._profile = engine, 0
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size == SCRATCH
        self._state["device_memory"] = memory

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
        assert self._state["device_memory"]
        addresses, shapes = dict(self._addresses), dict(self._shapes)
        Device.here.started.append(shapes.get("tokens", ()))
        Device.here.later(lambda: self._execute(addresses, shapes))
        return True

    def _execute(self, addresses: dict[str, int], shapes: dict[str, tuple[int, ...]]) -> None:
        """One call, in its turn."""
        network = self._engine._network
        given = {}
        for tensor in network._inputs:
            shape = shapes.get(tensor.name, tensor._shape)
            given[tensor.name] = view(addresses[tensor.name], shape, tensor._kind)
        for name, result in network.evaluate(given).items():
            source = self._engine._alias(name)
            if source is None:
                view(addresses[name], result.shape, NAMES[result.dtype]).copy_(result)
            else:
                assert addresses[name] == addresses[source]
                assert result.data_ptr() == given[source].data_ptr()


class Engine(Guarded):
    """ICudaEngine of a recorded network and the configuration that it was built with."""

    def __init__(self, known: Api, network: Any, config: Any) -> None:
        super().__init__(known, "ICudaEngine")
        self._network = network
        self._profiles = [profile._shapes for profile in config._profiles]
        self._names = [tensor.name for tensor in (*network._inputs, *network._outputs)]
        sizes = dict.fromkeys(("device_memory_size", "device_memory_size_v2"), SCRATCH)
        self._state.update(num_io_tensors=len(self._names), num_optimization_profiles=len(self._profiles), **sizes)

    def get_tensor_name(self, index: int) -> str:
        return str(self._names[index])

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._api.enums["TensorIOMode"]
        return modes["INPUT"] if any(tensor.name == name for tensor in self._network._inputs) else modes["OUTPUT"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return next(tensor._shape for tensor in self._network._inputs if tensor.name == name)

    def _alias(self, name: str) -> str | None:
        layer = next(tensor._source for tensor in self._network._outputs if tensor.name == name)
        return layer._inputs[0].name if layer._kind == "add_kv_cache_update" else None

    def create_execution_context_without_device_memory(self) -> Context:
        return Context(self._api, self)

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


@pytest.fixture
def trt_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """The runtime on the emulated GPU with a TensorRT of a version: what it gives builds bundles too."""
    names = [name for name in sys.modules if name.startswith("runtime.cuda.")]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    bindings = ModuleType("cuda.bindings")
    bindings.driver = ModuleType("cuda.bindings.driver")  # type: ignore[attr-defined]
    for name, module in (("cuda", ModuleType("cuda")), ("cuda.bindings", bindings)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(library, "build", emulated.build)
    monkeypatch.setattr(emulated, "BYTES", 32 << 20)

    def install(version: str) -> Any:
        trt = tensorrt(version)
        module = ModuleType("tensorrt")
        module.__dict__.update(vars(trt))
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        import runtime.cuda.native as native

        monkeypatch.setattr(native, "Device", Device)
        return trt

    yield install
    for name in [name for name in sys.modules if name.startswith("runtime.cuda.")]:
        del sys.modules[name]
