"""A decoder's one engine as the scheduler's executable: the network as recorded, computed with PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from compiler.ir.interpreter import torch_dtype
from compiler.lower.plan import cache_of
from compiler.lower.tensorrt.cut import cut
from compiler.lower.tensorrt.dialects import dialect
from compiler.lower.tensorrt.network import create_network, emit
from runtime.native import Slots, merged
from runtime.program import Port
from tests.tensorrt import recorder
from tests.tensorrt.models import Tiny

SLOTS = 3


class Recorded:
    """What `runtime.executable.Executable` asks for; the caches are full of what nothing may read."""

    blocks, cache_bytes = SLOTS, 0

    def __init__(self, model: Tiny, version: str) -> None:
        pieces = cut(model.graph)
        (self.segment,) = pieces.segments.values()
        (self.step,) = pieces.steps
        trt, line = recorder.module(version), dialect(version)
        self.network: Any = create_network(trt, trt.Builder(trt.Logger()), line)
        self.emitter = emit(trt, self.segment.graph, self.network, line)
        self.network.finish()
        self.weights = {name: tensor.make(model.weights) for name, tensor in pieces.tensors.items()}
        cache = cache_of(pieces.graph)
        assert cache is not None
        assert cache.kind == "linear"
        self.block_size = cache.block_size
        self.caches: dict[str, torch.Tensor] = {}
        for layer in cache.layers:
            for name, dim in ((layer.k, layer.dim), (layer.v, layer.value_dim)):
                made = torch.full((SLOTS, layer.heads, cache.block_size, dim), 7.0, dtype=torch_dtype(layer.dtype))
                made[:, :, -1] = 0.0  # as the runtime clears it; the place that is never written
                self.caches[name] = made
        ports = [Port(value.name, value.type.dtype, value.type.shape) for value in model.graph.inputs]
        self.slots = Slots(ports, SLOTS, cache.block_size)
        self.shapes: list[tuple[int, int]] = []

    def close(self) -> None:
        self.caches.clear()

    def execute(self, batch: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        calls = self.slots.calls(batch)
        found = []
        for call in calls:
            self.shapes.append((call.sequences, call.tokens))
            given: dict[str, torch.Tensor] = {}
            for port, name in self.step.inputs.items():
                kind, _, key = name.rpartition(":")
                if kind == "weight":
                    given[port] = self.weights[key]
                elif kind == "cache":  # neighbouring slots are one tensor, where they lie
                    given[port] = self.caches[key][call.first : call.first + call.sequences]
                else:
                    given[port] = torch.from_numpy(np.ascontiguousarray(call.arrays[key]))
            outputs = self.network.evaluate(given)
            for port, name in self.step.outputs.items():
                if name.startswith("cache:"):
                    where = [key for key, value in self.step.inputs.items() if value == name]
                    assert outputs[port].data_ptr() == given[where[0]].data_ptr()  # in place
            (logits,) = (outputs[port] for port, name in self.step.outputs.items() if ":" not in name)
            found.append(logits.numpy())
        return {"logits": merged(calls, found, len(batch["select"]))}
