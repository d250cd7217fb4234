"""Builds the OpenVINO model of one segment and writes it as xml and bin."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import openvino as ov
import openvino.opset15 as ops
from openvino.opset16 import identity

from compiler.ir.core import Graph

# imported to register how operations are written
from compiler.lower.openvino import attention, operations, quantize, routing  # noqa: F401
from compiler.lower.openvino.dynamic import dynamic_group
from compiler.lower.openvino.emitter import TYPES, Emitter, element

if TYPE_CHECKING:
    import torch


def model_of(
    graph: Graph,
    weights: Callable[[str], torch.Tensor],
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[ov.Model, Emitter]:
    """The OpenVINO model of a segment, its ports named as in the IR; keep the emitter as long as the model."""
    emitter = Emitter(weights, progress, dynamic_group(graph))
    for value in graph.inputs:
        emitter.scope[value.name] = emitter.widened(emitter.parameter(value.name, value.type), value.type)
    emitter.run(graph.equations)
    results = []
    for port, value in graph.outputs:
        output, kind = emitter.node(value), element(TYPES[value.type.dtype])
        if output.get_element_type() != kind:
            output = ops.convert(output, kind).output(0)
        results.append(_result(port, output))
    results += [_result(name, output) for name, output in emitter.extra]
    model = ov.Model(results, emitter.parameters, graph.name)
    _name_helpers(model)
    return model, emitter


def _result(name: str, output: ov.Output) -> ov.Node:
    # one tensor has one name in the xml: what is an input too, or an output already, gets a tensor of its own
    if output.get_names():
        output = identity(output).output(0)
    result = ops.result(output)
    result.set_friendly_name(name)
    result.output(0).set_names({name})
    return result


def _name_helpers(model: ov.Model) -> None:
    """Name helpers after the node they serve: automatic names count through the process and differ from run to run."""
    named: dict[str, int] = {}
    for node in reversed(model.get_ordered_ops()):
        if node.get_friendly_name() != node.get_name():
            continue
        reader = min(port.get_node().get_friendly_name() for port in node.output(0).get_target_inputs())
        name = f"{reader}/{node.get_type_name()}"
        named[name] = number = named.get(name, 0) + 1
        node.set_friendly_name(name if number == 1 else f"{name}.{number}")


def write(
    graph: Graph,
    weights: Callable[[str], torch.Tensor],
    path: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write a segment; weights keep their type. Raises OSError where the disk is full."""
    model, emitter = model_of(graph, weights, progress)
    if progress is not None:
        progress("write", 0, 1)
    try:
        ov.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as error:
        needed = sum(node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant")
        if shutil.disk_usage(path.parent).free < needed:  # OpenVINO says only "iostream error"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    finally:
        del emitter
    if progress is not None:
        progress("write", 1, 1)
