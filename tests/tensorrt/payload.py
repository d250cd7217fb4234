"""Makes what on_gpu.py runs: graphs as text, inputs and the interpreter's outputs as arrays. Needs PyTorch, no GPU.

python -m tests.tensorrt.payload FOLDER [--all] [--version 8.6]

Every segment of every family in float32 or in float16, by turns, and of every other family with INT8 products; with
--all in all of these.
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
from compiler.ir.parser import parse
from compiler.lower.tensorrt.cut import cut
from compiler.lower.tensorrt.dialects import Dialect, dialect
from specs.precision import load_recipe
from tests.conformance.test_operations import PAIRS, feed, typed
from tests.conformance.tolerances import tolerance
from tests.tensorrt.case import Case, halves, write
from tests.tensorrt.driver import Values, baked, packed, padded, run_plan, states_of
from tests.tensorrt.low_bit import low_bit, native
from tests.tensorrt.models import SPECS, Tiny, tiny
from tests.tensorrt.test_contract import ALL
from tests.tensorrt.test_operations import supported

PRECISIONS = ("fp32", "fp16")
# On a GPU these are CUDA's fast versions (CUDA C++ Programming Guide, intrinsic functions); the largest that was seen,
# TensorRT 8.6 on an H200, is 8.6e-6 for silu of numbers up to 9.
FAST = frozenset({"exp", "rsqrt", "cos", "sin", "tanh", "erf", "sigmoid", "silu", "gelu"})
FUNCTIONS = 2e-5
# A model's segments, relative to the largest number: what the issue asks of float32, and some roundings of float16.
SEGMENT = {"fp32": 1e-3, "fp16": 16 * 2.0**-11}


def cases(line: Dialect, *, everything: bool = False) -> Iterator[Case]:
    """Every operation in every type of a version, then segments: one of each family, then the next of each."""
    # those that go together stand together: of one kind, without or with float16, of equal dims
    yield from sorted(operations(line), key=lambda case: (case.kind, halves(case.graph), str(case.graph.dims)))
    yield from (product(held=held) for held in (False, True))
    yield from quantized_segments(ALL, "w8a8_sq_static", "fp16", held=True)
    families = []
    for number, path in enumerate(SPECS):
        both = [list(segments(path, precision)) for precision in PRECISIONS]
        turns = [pair if everything else pair[(number + index) % 2 :][:1] for index, pair in enumerate(_pairs(both))]
        families.append([case for chosen in turns for case in chosen])
        for index, (recipe, base) in enumerate(native(line.toolchain)):
            if base != "bf16" and (everything or path == ALL or index == number % (2 * len(native(line.toolchain)))):
                families[-1] += quantized_segments(path, recipe, base)
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
        for name in {"s", "o"} & set(weights):  # TensorRT wants positive scales
            weights[name] = weights[name].float().abs().to(weights[name].dtype)
        pieces = cut(graph)
        (step,) = pieces.steps
        (segment,) = pieces.segments.values()
        stored = {name: tensor.make(weights.__getitem__) for name, tensor in pieces.tensors.items()}
        given = {
            port: stored[name.removeprefix("weight:")] if name.startswith("weight:") else inputs[name]
            for port, name in step.inputs.items()
        }
        expected = run(segment.graph, given, {}.__getitem__)
        quantized = case.op in ("quantize", "dequantize", "row_scale")
        of_result = quantized or case.op == "cast"
        bound = tolerance(case.op, segment.graph.outputs[0][1].type.dtype if of_result else dtype)
        # sums of any size: what a bound says of size 1 holds of theirs
        size = max(float(tensor.abs().max()) for tensor in expected.values()) if case.op == "dequantize" else 1.0
        least = FUNCTIONS if case.op in FAST and dtype == "f32" else 0.0
        bounds = dict.fromkeys(expected, (max(bound.absolute * size, least), bound.relative))
        kind = "quantized" if quantized else "operation"
        yield Case(f"{case.name}-{dtype}", kind, segment.graph, arrays(given), arrays(expected), bounds)


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

    run_plan(pieces, _batch(model, model.graph), weights, states_of(pieces.graph), engine)
    yield from found.values()


PRODUCT = """graph segment(%x: f16[T,256], %t: f32[1]{inputs}) {{
  dim T in 1..16..64
  {weights}%q: i8[T,256] = quantize(%x, %t) {{dtype = "i8"}}
  %r: f16[T,256] = dequantize(%q, %t) {{dtype = "f16"}}
  %w: f16[128,256] = dequantize(%c, %s) {{dtype = "f16"}}
  %y: f16[T,128] = matmul(%r, %w) {{transpose_b = true}}
  return y = %y
}}
"""
INPUTS = ", %c: i8[128,256], %s: f32[128,1]"
HELD = '%c: i8[128,256] = weight() {name = "c"} %s: f32[128,1] = weight() {name = "s"} '


def product(*, held: bool) -> Case:
    """One product of codes, of numbers that no rounding brings near a tie: exact but for the type of the result."""
    generator = torch.Generator().manual_seed(5)
    quarters = torch.randint(-520, 520, (16, 256), generator=generator)
    given = {
        "x": (torch.where(quarters % 4 == 2, quarters + 1, quarters) * 2.0**-7).half(),
        "t": torch.tensor([2.0**-5]),
    }
    own = {
        "c": torch.randint(-127, 128, (128, 256), generator=generator, dtype=torch.int8),
        "s": torch.rand(128, 1, generator=generator) * 0.01 + 0.001,
    }
    graph = parse(PRODUCT.format(inputs="" if held else INPUTS, weights=HELD if held else ""))
    expected = run(graph, given if held else {**given, **own}, own.__getitem__)
    # dequantized numbers are rounded to float16 by the IR and not here: 2^-11 of sums of 256 that partly cancel
    bound = 4 * 2.0**-11 * float(expected["y"].abs().max())
    name = f"product of codes{', held' if held else ''}"
    outside, inside = ({}, own) if held else (own, {})
    return Case(
        name, "product", graph, arrays({**given, **outside}), arrays(expected), {"y": (bound, 0.0)}, arrays(inside)
    )


def quantized_segments(path: Path, recipe: str, base: str, *, held: bool = False) -> Iterator[Case]:
    """Every distinct engine of a quantized family; `held`: with weights inside.

    An output may be off by a step of the codes in some inputs, where they lie near a tie: the recipe's bound.
    """
    model = low_bit(path, recipe, base)
    pieces = cut(model.graph, baked=held)
    weights = {name: tensor.make(model.weights) for name, tensor in pieces.tensors.items()}
    inside = baked(pieces, weights)
    found: dict[int, Case] = {}

    def engine(graph: Graph, inputs: Values) -> dict[str, torch.Tensor]:
        outputs = run(graph, inputs, weights.__getitem__)
        if id(graph) not in found and any(eq.op == "quantize" for eq in graph.equations):
            sizes = {port: float(tensor.float().abs().max().clamp(min=1.0)) for port, tensor in outputs.items()}
            bounds = {port: (load_recipe(recipe).bound.relative * size, 0.0) for port, size in sizes.items()}
            name = f"{model.model.name} {recipe} {base}{' held' if held else ''} segment {len(found)}"
            own = {str(eq.attr["name"]): inside(str(eq.attr["name"])) for eq in graph.equations if eq.op == "weight"}
            found[id(graph)] = Case(name, recipe, graph, arrays(inputs), arrays(outputs), bounds, own)
        return outputs

    run_plan(pieces, _batch(model.model, pieces.graph), weights, states_of(pieces.graph), engine)
    yield from found.values()


def _batch(model: Tiny, graph: Graph) -> Values:
    return packed(graph, [0, 0, 0], [5, 1, 9]) if model.role == "decoder" else padded(graph, [7, 3])


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
