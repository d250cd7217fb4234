"""Makes what on_gpu.py runs: graphs as text, inputs and the interpreter's outputs as arrays. Needs PyTorch, no GPU.

python -m tests.tensorrt.payload FOLDER [--all] [--version 8.6]

Every segment of every family in float32 or in float16, by turns; with --all in both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compiler.ir import Graph
from compiler.ir.interpreter import run
from compiler.lower.tensorrt.cut import cut
from compiler.lower.tensorrt.dialects import Dialect, dialect
from tests.conformance.test_operations import PAIRS, feed, typed
from tests.conformance.tolerances import tolerance
from tests.tensorrt.case import Case, write
from tests.tensorrt.driver import Values, packed, padded, run_plan, states_of
from tests.tensorrt.models import SPECS, tiny
from tests.tensorrt.test_operations import supported

PRECISIONS = ("fp32", "fp16")
# A model's segments, relative to the largest number: what the issue asks of float32, and some roundings of float16.
SEGMENT = {"fp32": 1e-3, "fp16": 16 * 2.0**-11}


def cases(line: Dialect, *, everything: bool = False) -> Iterator[Case]:
    """Every operation in every type of a version, then segments: one of each family, then the next of each."""
    yield from sorted(operations(line), key=lambda case: str(case.graph.dims))  # those of equal dims go together
    families = []
    for number, path in enumerate(SPECS):
        both = [list(segments(path, precision)) for precision in PRECISIONS]
        turns = [pair if everything else pair[(number + index) % 2 :][:1] for index, pair in enumerate(_pairs(both))]
        families.append([case for chosen in turns for case in chosen])
    for one_of_each in zip_longest(*families):
        yield from (case for case in one_of_each if case is not None)


def _pairs(both: Sequence[Sequence[Case]]) -> Iterator[list[Case]]:
    for pair in zip_longest(*both):  # a precision may cut a model otherwise
        yield [case for case in pair if case is not None]


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
        yield Case(f"{case.name}-{dtype}", "operation", segment.graph, arrays(given), arrays(expected), bounds)


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
        if id(graph) not in found:
            found[id(graph)] = Case(name, precision, graph, arrays(inputs), arrays(outputs), bounds)
        return outputs

    batch = packed(model.graph, [0, 0, 0], [5, 1, 9]) if model.role == "decoder" else padded(model.graph, [7, 3])
    run_plan(pieces, batch, weights, states_of(pieces.graph), engine)
    yield from found.values()


def arrays(tensors: Values) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors as arrays; no bf16: 8.6 has none."""
    return {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}


def main() -> int:
    """Write the cases."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--version", default="8.6")
    given = parser.parse_args()
    count = write(cases(dialect(given.version), everything=given.all), given.folder)
    sys.stdout.write(f"{count} cases\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
