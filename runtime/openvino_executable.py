"""Runs a plan whose engines are OpenVINO models; owns the KV cache tensors, which the engines write in place."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from runtime.bundle import Bundle
from runtime.cache import Cached, available_memory, decide_size
from runtime.executable import Array
from runtime.program import CacheLayout
from specs.errors import SpecRTError, Where

BACKEND = "openvino"
_LOG = logging.getLogger("runtime")


class OpenVINOExecutable(Cached):
    """The engines of a bundle, compiled for this machine's CPU."""

    def __init__(self, bundle: Bundle, *, cache_tokens: int | None = None, threads: int | None = None) -> None:
        """Compile the engines and allocate the caches.

        Raises SpecRTError BUNDLE-004 for another OpenVINO, BUNDLE-009 for a step of another kind, RUN-011 and RUN-012
        for the size of the cache, RUN-016 for `threads`.
        """
        _check_toolchain(bundle)
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise SpecRTError("RUN-016", f"`threads` is {threads!r}, expected a whole number from 1 up")
        import openvino

        self._openvino = openvino
        self.size = None
        self._caches: list[Array] = []  # [blocks, ...]
        self._requests = [_compile(openvino, bundle, index, threads) for index in range(len(bundle.program.steps))]
        if bundle.program.cache is not None:
            limits = bundle.limits
            self.size = decide_size(
                bundle.program.cache, max_batch=limits.max_batch, max_sequence=limits.max_sequence,
                cache_tokens=cache_tokens, available=available_memory(),
            )  # fmt: skip
            log = _LOG.info if cache_tokens is not None or self.size.blocks == self.size.wanted else _LOG.warning
            log("%s; %d tokens are what the limits can use", self.size, self.size.wanted * self.size.block_size)
            self._allocate(bundle.program.cache, self.size.blocks)
        # where each value of the plan goes in and comes out
        steps = list(zip(self._requests, bundle.program.steps, strict=True))
        produced: set[str] = set()
        self._calls: list[tuple[Any, list[tuple[str, int]], list[tuple[str, str]], list[tuple[str, str]]]] = []
        for request, step in steps:
            ports = {name: index for index, port in enumerate(request.model_inputs) for name in port.get_names()}
            given = [(value, ports[port]) for port, value in step.inputs.items() if value not in produced]
            passed = [(value, port) for port, value in step.inputs.items() if value in produced]
            produced |= set(step.outputs.values())
            self._calls.append((request, given, passed, [(value, port) for port, value in step.outputs.items()]))
        wanted = {value: name for name, value in bundle.program.values.items()}
        self._outputs: list[tuple[str, Any, int]] = []
        for request, step in steps:
            places = {name: index for index, port in enumerate(request.model_outputs) for name in port.get_names()}
            self._outputs += [
                (wanted[value], request, places[port]) for port, value in step.outputs.items() if value in wanted
            ]
        self._bound: dict[tuple[int, int], Array] = {}

    def execute(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Run the steps in order; see runtime.executable.Executable."""
        bound = self._bound
        values: dict[str, Any] = {}
        for number, (request, given, passed, outputs) in enumerate(self._calls):
            for name, port in given:
                array = batch[name]
                if bound.get((number, port)) is not array:
                    request.set_input_tensor(port, self._openvino.Tensor(array, shared_memory=True))
                    bound[number, port] = array  # the engine reads it where it lies: it must not be freed
            for name, place in passed:
                request.set_tensor(place, values[name])
            request.start_async()
            request.wait()
            if len(self._calls) > 1:
                values |= {name: request.get_tensor(place) for name, place in outputs}
        return {name: request.get_output_tensor(place).data for name, request, place in self._outputs}

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks of all caches; see runtime.executable.Executable."""
        sources, targets = (list(each) for each in zip(*pairs, strict=True))
        for cache in self._caches:
            cache[targets] = cache[sources]

    def close(self) -> None:
        """Give up engines and caches."""
        self._bound.clear()
        self._caches.clear()
        self._calls, self._outputs, self._requests = [], [], []

    def _allocate(self, layout: CacheLayout, blocks: int) -> None:
        """One tensor for each cache; engines never read what was not written, so the memory is left as it comes."""
        for layer in layout.layers:
            for port, width in ((layer.k, layer.dim), (layer.v, layer.value_dim)):
                shape = self._openvino.Shape([blocks, layer.heads, layout.block_size, width])
                kind = getattr(self._openvino.Type, layer.dtype)
                tensor = self._openvino.Tensor(kind, shape)
                self._caches.append(tensor.data)
                for request in self._requests:
                    if any(port in known.get_names() for known in request.model_inputs):
                        request.set_tensor(port, tensor)


def _check_toolchain(bundle: Bundle) -> None:
    """The plugin's own operations change between releases (2026.3 -> 2026.4), not between patches."""
    wanted = bundle.toolchain.get(BACKEND, "?")
    try:
        found = metadata.version(BACKEND)
    except metadata.PackageNotFoundError:
        found = "none"
    if wanted.split(".")[:2] != found.split(".")[:2]:
        message = f"the bundle was compiled with OpenVINO {wanted}, installed is {found}"
        hint = f"`pip install openvino=={wanted}`, or compile again: `specrt compile SOURCE --out BUNDLE`"
        raise SpecRTError("BUNDLE-004", message, where=Where(str(bundle.path)), hint=hint)


def _compile(openvino: Any, bundle: Bundle, index: int, threads: int | None) -> Any:
    step = bundle.program.steps[index]
    if (step.kind, step.backend) != ("engine", BACKEND):
        message = f"step {index} is `{step.kind}` of `{step.backend}`, this runtime runs `engine` of `{BACKEND}`"
        hint = "compile for this machine: `specrt compile SOURCE --target cpu`"
        raise SpecRTError("BUNDLE-009", message, where=Where(str(bundle.path / "plan.json")), hint=hint)
    core = openvino.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin, and with it the operations that the file uses
    model = core.read_model(bundle.path / step.file)
    restore_properties(model)
    config = dict(step.config)
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = str(threads)
    return core.compile_model(model, "CPU", config).create_infer_request()


def restore_properties(model: Any) -> None:
    """Give a model read from a file the properties that the file does not hold: head counts and sizes of attention."""
    for node in model.get_ops():
        if node.get_type_name() == "PagedAttentionExtension":
            info = node.get_rt_info()
            for letter, port in (("k", 3), ("v", 4)):
                shape = node.input(port).get_partial_shape()
                # a row of bytes begins with its scale and zero
                head = 8 if node.input(port).get_element_type().get_type_name() == "u8" else 0
                info[f"num_{letter}_heads"] = shape[1].get_length()
                info[f"{letter}_head_size"] = shape[3].get_length() - head
