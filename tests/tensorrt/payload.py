"""Makes what on_gpu.py runs: graphs as text, inputs and the interpreter's outputs as arrays. Needs PyTorch, no GPU.

python -m tests.tensorrt.payload FOLDER [VERSION]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compiler.ir import Graph, Value
from compiler.ir.core import substitute
from compiler.ir.interpreter import run
from compiler.lower.tensorrt.cut import cut
from compiler.lower.tensorrt.dialects import Dialect, dialect
from tests.conformance.test_operations import PAIRS, feed, typed
from tests.conformance.tolerances import tolerance
from tests.tensorrt.driver import Values, packed, padded, run_plan, states_of
from tests.tensorrt.models import SPECS, tiny
from tests.tensorrt.test_operations import supported

TOGETHER = 20  # operations in one network: a build costs a second whatever is in it
# A model's segments, relative to the largest number: what the issue asks of float32, and some roundings of float16.
SEGMENT = {"fp32": 1e-3, "fp16": 16 * 2.0**-11}


@dataclass(frozen=True)
class Case:
    """One graph with what goes in and what must come out; `bounds` are absolute and relative, for each output."""

    name: str
    graph: Graph
    inputs: Values
    outputs: Values
    bounds: Mapping[str, tuple[float, float]]


def write(cases: Iterator[Case], folder: Path) -> int:
    """Write cases as NUMBER.ir and NUMBER.npz with an index; gives how many."""
    folder.mkdir(parents=True, exist_ok=True)
    index = []
    for number, case in enumerate(cases):
        (folder / f"{number}.ir").write_text(str(case.graph), encoding="utf-8")
        arrays = {f"in/{name}": _array(tensor) for name, tensor in case.inputs.items()}
        arrays |= {f"out/{name}": _array(tensor) for name, tensor in case.outputs.items()}
        np.savez(folder / f"{number}.npz", **arrays)
        index.append({"name": case.name, "bounds": dict(case.bounds)})
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    return len(index)


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.contiguous().numpy()  # no bf16: 8.6 has none
    return array


def cases(line: Dialect) -> Iterator[Case]:
    """Every operation in every type of a version, joined to networks, then every segment of every family."""
    group: list[Case] = []
    for case in operations(line):
        if group and (len(group) == TOGETHER or group[0].graph.dims != case.graph.dims):
            yield joined(group)
            group = []
        group.append(case)
    yield joined(group)
    for path in SPECS:
        for precision in ("fp32", "fp16"):
            yield from segments(path, precision)


def operations(line: Dialect) -> Iterator[Case]:
    """The conformance cases that a version has, as graphs whose weights are inputs."""
    for case, dtype in PAIRS:
        graph = typed(case, dtype)
        assert graph is not None
        if dtype == "bf16" or not supported(graph, line) or case.op == "paged_attention":
            continue
        inputs, weights = feed(graph, case)
        pieces = cut(graph)
        (step,) = pieces.steps
        (segment,) = pieces.segments.values()
        stored = {name: tensor.make(weights.__getitem__) for name, tensor in pieces.tensors.items()}
        given = {
            port: stored[name.removeprefix("weight:")] if name.startswith("weight:") else inputs[name]
            for port, name in step.inputs.items()
        }
        expected = run(segment.graph, given, {}.__getitem__)
        bound = tolerance(case.op, segment.graph.outputs[0][1].type.dtype if case.op == "cast" else dtype)
        bounds = dict.fromkeys(expected, (bound.absolute, bound.relative))
        yield Case(f"{case.name}-{dtype}", segment.graph, given, expected, bounds)


def joined(group: list[Case]) -> Case:
    """Several cases side by side in one graph; output `y3` is the third's."""
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    bounds: dict[str, tuple[float, float]] = {}
    values: list[Value] = []
    equations = []
    ports = []
    for number, case in enumerate(group):
        names = {value.name: f"c{number}.{value.name}" for value in case.graph.inputs}
        names |= {eq.result.name: f"c{number}.{eq.result.name}" for eq in case.graph.equations}
        known = {value.name: Value(names[value.name], value.type) for value in case.graph.inputs}
        known |= {eq.result.name: Value(names[eq.result.name], eq.result.type) for eq in case.graph.equations}
        values += [known[value.name] for value in case.graph.inputs]
        equations += [replace(substitute(eq, known), results=(known[eq.result.name],)) for eq in case.graph.equations]
        ((port, value),) = case.graph.outputs
        ports.append((f"y{number}", known[value.name]))
        inputs |= {names[name]: tensor for name, tensor in case.inputs.items()}
        outputs[f"y{number}"] = case.outputs[port]
        bounds[f"y{number}"] = case.bounds[port]
    graph = Graph("joined", group[0].graph.dims, tuple(values), tuple(equations), tuple(ports))
    return Case(", ".join(case.name for case in group), graph, inputs, outputs, bounds)


def segments(path: Path, precision: str) -> Iterator[Case]:
    """Every distinct engine of a family, on what it reads in a call of the whole model."""
    model = tiny(path, precision)
    pieces = cut(model.graph)
    weights = {name: tensor.make(model.weights) for name, tensor in pieces.tensors.items()}
    found: dict[int, Case] = {}

    def engine(graph: Graph, inputs: Values) -> dict[str, torch.Tensor]:
        outputs = run(graph, inputs, {}.__getitem__)
        sizes = {port: float(tensor.float().abs().max().clamp(min=1.0)) for port, tensor in outputs.items()}
        bounds = {port: (SEGMENT[precision] * size, 0.0) for port, size in sizes.items()}
        name = f"{model.name} {precision} segment {len(found)}"
        found.setdefault(id(graph), Case(name, graph, dict(inputs), outputs, bounds))
        return outputs

    batch = packed(model.graph, [0, 0, 0], [5, 1, 9]) if model.role == "decoder" else padded(model.graph, [7, 3])
    run_plan(pieces, batch, weights, states_of(pieces.graph), engine)
    yield from found.values()


if __name__ == "__main__":
    line = dialect(sys.argv[2] if len(sys.argv) > 2 else "8.6")
    sys.stdout.write(f"{write(cases(line), Path(sys.argv[1]))} cases\n")
