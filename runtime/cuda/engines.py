"""TensorRT engines: found in the bundle for this TensorRT and GPU, loaded once, run with addresses set per call."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorrt as trt

from runtime.cuda.driver import Device
from runtime.cuda.missing import FOLDER, not_built, tag, unreadable

_LOG = logging.getLogger("runtime.tensorrt")
_LATER = int(trt.__version__.split(".")[0]) >= 11  # these calls have other names, which 10.0 has not yet


class _Logger(trt.ILogger):  # type: ignore[misc]
    """TensorRT's messages, in ours."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity: Any, text: str) -> None:
        kinds = trt.ILogger
        levels = {kinds.INTERNAL_ERROR: 40, kinds.ERROR: 40, kinds.WARNING: 30, kinds.INFO: 20}
        _LOG.log(levels.get(severity, 10), "%s", text)


class Engine:
    """A deserialized engine; a context for each profile and each use whose shapes must stay (a captured graph)."""

    def __init__(self, engine: Any, device: Device) -> None:
        self._engine, self._device = engine, device
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.dynamic = tuple(name for name in inputs if -1 in tuple(engine.get_tensor_shape(name)))
        self.memory = int(engine.device_memory_size_v2 if _LATER else engine.device_memory_size)
        self._contexts: dict[tuple[int, object], tuple[Any, dict[str, tuple[int, ...]]]] = {}

    def enqueue(
        self,
        profile: int,
        use: object,
        scratch: int,
        addresses: Mapping[str, int],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Put one call into the stream; `addresses` by port, `shapes` of the ports in `dynamic`."""
        context, known = self._context(profile, use, scratch)
        for name in self.dynamic:
            shape = shapes[name]
            if known.get(name) != shape:
                if not context.set_input_shape(name, shape):
                    raise AssertionError(f"the engine refuses {list(shape)} for `{name}` in profile {profile}")
                known[name] = shape
        for name, address in addresses.items():
            context.set_tensor_address(name, address)
        if not context.execute_async_v3(int(self._device.stream)):
            raise AssertionError("TensorRT could not start an engine; its log says why")

    def _context(self, profile: int, use: object, scratch: int) -> tuple[Any, dict[str, tuple[int, ...]]]:
        found = self._contexts.get((profile, use))
        if found is None:
            if _LATER:
                strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
                context = self._engine.create_execution_context(strategy)
                context.set_device_memory(scratch, self.memory)
            else:
                context = self._engine.create_execution_context_without_device_memory()
                context.device_memory = scratch
            if self._engine.num_optimization_profiles > 1:
                context.set_optimization_profile_async(profile, int(self._device.stream))
                self._device.wait()
            found = self._contexts[profile, use] = (context, {})
        return found

    def close(self) -> None:
        """Give up contexts, then the engine."""
        self._contexts.clear()
        self._engine = None


class Engines:
    """The engines of a bundle by the segment's file."""

    def __init__(self, folder: Path, files: set[str], device: Device) -> None:
        """Raises SpecRTError BUNDLE-020 where a plan is not built for this TensorRT and GPU."""
        self._logger = _Logger()  # TensorRT keeps a bare pointer to it
        self._runtime = trt.Runtime(self._logger)
        here = folder / FOLDER / tag(trt.__version__, device.name)
        paths = {file: here / f"{Path(file).stem}.plan" for file in sorted(files)}
        for path in paths.values():
            if not path.is_file():
                raise not_built(folder, here.name)
        self._engines: dict[str, Engine] = {}
        for file, path in paths.items():
            engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if engine is None:
                raise unreadable(folder, path, trt.__version__)
            self._engines[file] = Engine(engine, device)

    def __getitem__(self, file: str) -> Engine:
        return self._engines[file]

    @property
    def memory(self) -> int:
        """Bytes that one engine at a time works in."""
        return max((engine.memory for engine in self._engines.values()), default=0)

    def close(self) -> None:
        """Give up every engine, then TensorRT's runtime."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        self._runtime = None
