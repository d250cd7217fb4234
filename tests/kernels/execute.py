"""Runs a segment's kernels in Triton's interpreter, its weights laid as a bundle has them."""

from __future__ import annotations

from math import prod

import torch

from compiler.ir.core import Graph
from compiler.ir.interpreter import torch_dtype
from compiler.kernels.row_source import rows_of
from compiler.kernels.rows import program_of
from compiler.lower.layouts import bytes_of
from compiler.lower.low_bit import kernel_layouts
from compiler.lower.stored_weights import Tensor
from tests.kernels.interpreted import kernel


def execute(
    graph: Graph, inputs: dict[str, torch.Tensor], rows: int, architecture: int = 90
) -> dict[str, torch.Tensor]:
    """The outputs of a segment by port; `inputs` as the IR has them."""
    program = program_of(graph, rows, architecture)
    memory = laid(graph, inputs, architecture)
    sizes = {
        dim: inputs[value.name].shape[axis]
        for value in graph.inputs
        for axis, dim in enumerate(value.type.shape)
        if isinstance(dim, str)
    }
    for port, value in graph.outputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in value.type.shape]
        memory[port] = torch.full(shape, torch.nan).to(torch_dtype(value.type.dtype))
    most = max(prod(sizes[dim] for dim in call.rows) for call in program.calls)
    temps = {name: torch.full((most * size,), 0xFF, dtype=torch.uint8) for name, size in program.temps.items()}
    for call in program.calls:
        count = prod(sizes[dim] for dim in call.rows)
        kinds = dict(call.launch.arguments)
        values: dict[str, object] = {**sizes, "count": count}
        for argument, place in call.places.items():
            if kinds.get(argument):  # what joins splits is given all that the product had
                kind, stored = torch_dtype(kinds[argument]), temps[place] if place in temps else memory[place]
                values[argument] = stored.view(kind) if place in temps or kind is torch.uint8 else stored
        tiles = -(-count // call.tile)
        grid = (tiles, 1, call.depth) if call.blocks == call.tile == 1 else (call.blocks, tiles, call.depth)
        arguments = [values[name] if kind else None for name, kind in call.launch.arguments]
        kernel(call.launch)[grid](*arguments, **call.launch.constants)
    return {port: memory[port] for port, _ in graph.outputs}


def laid(graph: Graph, inputs: dict[str, torch.Tensor], architecture: int = 90) -> dict[str, torch.Tensor]:
    """The inputs with low-bit weights in the layouts of kernels."""
    found = dict(inputs)
    for value, layout in kernel_layouts(graph.equations, architecture):
        assert not rows_of(value)
        found[value.name] = bytes_of(inputs[value.name], Tensor(value.name, value.type, layout=layout)).contiguous()
    return found
