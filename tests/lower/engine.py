"""Runs what lowering wrote through the real OpenVINO, as a runtime does; knows no cache policy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch

from compiler.ir import Graph
from compiler.lower import Lowered, lower

_TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "u8": torch.uint8}
_OPENVINO = {"f32": ov.Type.f32, "bf16": ov.Type.bf16, "f16": ov.Type.f16}


def to_openvino(tensor: torch.Tensor) -> ov.Tensor:
    """A copy of a tensor."""
    tensor = tensor.contiguous()
    if tensor.dtype is torch.bfloat16:
        out = ov.Tensor(ov.Type.bf16, ov.Shape(list(tensor.shape)))
        out.data.view(np.int16)[...] = tensor.view(torch.int16).numpy()
        return out
    return ov.Tensor(tensor.numpy().copy())


def to_torch(tensor: ov.Tensor) -> torch.Tensor:
    """A copy of a tensor."""
    if tensor.element_type == ov.Type.bf16:
        return torch.from_numpy(tensor.data.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(tensor.data))


class Engine:
    """The steps of a plan; `states` are cache tensors that live between calls."""

    def __init__(self, folder: Path) -> None:
        self.plan = json.loads((folder / "plan.json").read_text())
        core = ov.Core()
        core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin, and with it its extension operations
        self.requests = []
        for step in self.plan["steps"]:
            model = core.read_model(folder / step["file"])
            for node in model.get_ops():
                if node.get_type_name() == "PagedAttentionExtension":
                    info = node.get_rt_info()
                    for letter, port in (("k", 3), ("v", 4)):
                        shape = node.input(port).get_partial_shape()
                        info[f"num_{letter}_heads"] = shape[1].get_length()
                        coded = node.input(port).get_element_type() == ov.Type.u8
                        info[f"{letter}_head_size"] = shape[3].get_length() - (8 if coded else 0)
            self.requests.append(core.compile_model(model, "CPU", step["config"]).create_infer_request())

    def allocate(self, blocks: int, fill: float = float("nan")) -> None:
        """Caches of `blocks` blocks, filled with what nothing may read."""
        for layer in (self.plan["cache"] or {"layers": []})["layers"]:
            for port, size in ((layer["k"], layer["dim"]), (layer["v"], layer["value_dim"])):
                shape = (blocks, layer["heads"], self.plan["cache"]["block_size"], size)
                coded = layer["dtype"] == "u8"  # bytes of 255 are NaN as scales
                tensor = to_openvino(torch.full(shape, 255 if coded else fill, dtype=_TORCH[layer["dtype"]]))
                for request in self.requests:
                    if any(port in known.get_names() for known in request.model_inputs):
                        request.set_tensor(port, tensor)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        values: dict[str, Any] = dict(inputs)
        for step, request in zip(self.plan["steps"], self.requests, strict=True):
            for port, name in step["inputs"].items():
                request.set_tensor(port, to_openvino(values[name]))
            request.infer()
            for port, name in step["outputs"].items():
                values[name] = to_torch(request.get_tensor(port))
        return {port: values[name] for port, name in self.plan["outputs"].items()}


def lowered(graph: Graph, weights: Any, folder: Path, precision: str = "fp32") -> tuple[Engine, Lowered]:
    """Lower a graph into a folder and load it."""
    result = lower(graph, weights, folder, precision=precision)
    return Engine(folder), result
