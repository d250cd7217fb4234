"""A case for the GPU as files: a graph as text, what goes in and what must come out as arrays. Needs no PyTorch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from compiler.ir.core import Graph, Value, substitute
from compiler.ir.parser import parse

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


@dataclass(frozen=True)
class Case:
    """One graph with what goes in and what must come out; `bounds` are absolute and relative, for each output.

    `kind` is `operation` or `quantized` (several of one kind go into one network), or the precision of a segment;
    `held` are the weights of an engine that holds them, as the emitter asks for them.
    """

    name: str
    kind: str
    graph: Graph
    inputs: Arrays
    outputs: Arrays
    bounds: Mapping[str, tuple[float, float]]
    held: Arrays = field(default_factory=dict)


def halves(graph: Graph) -> bool:
    """Whether a network has float16: in one that does, TensorRT 8.6 computes float32 in it too, where it likes."""
    made = [value for equation in graph.equations for value in equation.results]
    return any(value.type.dtype == "f16" for value in (*graph.inputs, *made))


def write(cases: Iterable[Case], folder: Path) -> int:
    """Write cases as NUMBER.ir and NUMBER.npz with an index, in the order to run them; gives how many."""
    folder.mkdir(parents=True, exist_ok=True)
    index = []
    for number, case in enumerate(cases):
        (folder / f"{number}.ir").write_text(str(case.graph), encoding="utf-8")
        parts = {"in/": case.inputs, "out/": case.outputs, "held/": case.held}
        arrays = {head + name: array for head, part in parts.items() for name, array in part.items()}
        np.savez(folder / f"{number}.npz", **arrays)
        index.append({"name": case.name, "kind": case.kind, "bounds": dict(case.bounds)})
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    return len(index)


def read_index(folder: Path) -> list[dict[str, Any]]:
    """The index that `write` made."""
    index: list[dict[str, Any]] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    return index


def read(folder: Path, number: int) -> Case:
    """One case of a folder."""
    entry = read_index(folder)[number]
    with np.load(folder / f"{number}.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    inputs, outputs, held = (
        {name[len(head) :]: array for name, array in arrays.items() if name.startswith(head)}
        for head in ("in/", "out/", "held/")
    )
    graph = parse((folder / f"{number}.ir").read_text(encoding="utf-8"))
    bounds = {port: (float(pair[0]), float(pair[1])) for port, pair in entry["bounds"].items()}
    return Case(entry["name"], entry["kind"], graph, inputs, outputs, bounds, held)


def joined(group: Sequence[Case]) -> Case:
    """Cases of the same dims side by side in one graph; the third's output `y` is `c2_y`."""
    inputs: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    bounds: dict[str, tuple[float, float]] = {}
    values: list[Value] = []
    equations = []
    ports = []
    for number, case in enumerate(group):
        head = f"c{number}."
        made = [value for equation in case.graph.equations for value in equation.results]
        known = {value.name: Value(head + value.name, value.type) for value in (*case.graph.inputs, *made)}
        values += [known[value.name] for value in case.graph.inputs]
        equations += [
            replace(substitute(equation, known), results=tuple(known[value.name] for value in equation.results))
            for equation in case.graph.equations
        ]
        ports += [(f"c{number}_{port}", known[value.name]) for port, value in case.graph.outputs]
        inputs |= {head + name: array for name, array in case.inputs.items()}
        outputs |= {f"c{number}_{port}": array for port, array in case.outputs.items()}
        bounds |= {f"c{number}_{port}": bound for port, bound in case.bounds.items()}
    graph = Graph("joined", group[0].graph.dims, tuple(values), tuple(equations), tuple(ports))
    return Case(", ".join(case.name for case in group), group[0].kind, graph, inputs, outputs, bounds)
