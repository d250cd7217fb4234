"""A decoder's one engine as the scheduler's executable, computed with PyTorch: the network as recorded, or the IR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from compiler.ir import Graph
from compiler.ir.interpreter import Weights, run, torch_dtype
from compiler.lower.plan import cache_of
from compiler.lower.tensorrt.cut import cut
from compiler.lower.tensorrt.dialects import dialect
from compiler.lower.tensorrt.network import create_network, emit
from runtime.native import Slots, merged
from runtime.program import Port
from tests.tensorrt import recorder
from tests.tensorrt.driver import baked as arrays

SLOTS = 3


class Served:
    """What `runtime.executable.Executable` asks for, a call as the runtime makes it; what computes is a subclass's.

    The caches are full of what nothing may read.
    """

    blocks, cache_bytes = SLOTS, 0

    def __init__(self, graph: Graph, weights: Weights, *, baked: bool = False) -> None:
        self.pieces = cut(graph, baked=baked)
        (self.segment,) = self.pieces.segments.values()
        (self.step,) = self.pieces.steps
        self.weights = {name: tensor.make(weights) for name, tensor in self.pieces.tensors.items()}
        cache = cache_of(self.pieces.graph)
        assert cache is not None
        assert cache.kind == "linear"
        self.block_size = cache.block_size
        self.caches: dict[str, torch.Tensor] = {}
        for layer in cache.layers:
            for name, dim in ((layer.k, layer.dim), (layer.v, layer.value_dim)):
                made = torch.full((SLOTS, layer.heads, cache.block_size, dim), 7.0, dtype=torch_dtype(layer.dtype))
                made[:, :, -1] = 0.0  # as the runtime clears it; the place that is never written
                self.caches[name] = made
        ports = [Port(value.name, value.type.dtype, value.type.shape) for value in graph.inputs]
        self.slots = Slots(ports, SLOTS, cache.block_size)
        self.shapes: list[tuple[int, int]] = []

    def compute(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs of the engine, caches in place."""
        raise NotImplementedError

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
            outputs = self.compute(given)
            for port, name in self.step.outputs.items():
                if name.startswith("cache:"):
                    where = [key for key, value in self.step.inputs.items() if value == name]
                    assert outputs[port].data_ptr() == given[where[0]].data_ptr()  # in place
            (logits,) = (outputs[port] for port, name in self.step.outputs.items() if ":" not in name)
            found.append(logits.numpy())
        return {"logits": merged(calls, found, len(batch["select"]))}


class Recorded(Served):
    """Computed by the network as recorded."""

    def __init__(self, graph: Graph, weights: Weights, version: str, *, baked: bool = False) -> None:
        super().__init__(graph, weights, baked=baked)
        trt, line = recorder.module(version), dialect(version)
        self.network: Any = create_network(trt, trt.Builder(trt.Logger()), line)
        held = arrays(self.pieces, self.weights) if baked else None
        self.emitter = emit(trt, self.segment.graph, self.network, line, held)
        self.network.finish()

    def compute(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        outputs: dict[str, torch.Tensor] = self.network.evaluate(given)
        return outputs


class Interpreted(Served):
    """Computed as the IR means it."""

    def compute(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return run(self.segment.graph, given, self.weights.__getitem__)
