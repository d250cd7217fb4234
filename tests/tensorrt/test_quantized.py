"""Quantized models in engines: every product that a toolchain's file calls native, emitted for that version, taken by
its recorded API, and computed, against the interpreter on the same codes.

In float32 the codes are the same, and sums in another order, but where a number lies on a tie: so most rows are exact.
In 16 bits more of them lie near one, which is what the recipe's bound allows for, as for the CPU (tests/precision).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from compiler.ir import Graph
from compiler.ir.core import walk
from compiler.ir.interpreter import run
from compiler.ir.parser import parse
from compiler.lower.low_bit import KernelSteps
from compiler.lower.tensorrt.build import configure
from compiler.lower.tensorrt.cut import cut
from compiler.lower.tensorrt.dialects import DIALECTS, dialect
from compiler.lower.tensorrt.network import create_network, emit
from compiler.lower.tensorrt.options import BuildOptions
from compiler.passes.pipelines import pipeline
from compiler.passes.quantize import quantize
from compiler.passes.runner import run_passes
from specs.precision import load_recipe
from tests.golden_errors import check_raises
from tests.precision.test_families import EMULATED, OWN_ROUNDING, SENSITIVE, UNTRAINED
from tests.tensorrt import recorder
from tests.tensorrt.driver import Values, baked, recorded, run_plan, states_of
from tests.tensorrt.low_bit import low_bit, native
from tests.tensorrt.models import SPECS, tiny
from tests.tensorrt.test_contract import ALL, batches

# The norm of the difference over that of the result. Of most rows in float32: 2^-24 for each of some thirty roundings,
# with room. Of all together, and of all rows in 16 bits: a code that falls on the other side of a tie.
EXACT = 1e-5
# The recorded version that stands for a line of specs/toolchains.
VERSIONS = {dialect(version).toolchain: version for version in recorder.VERSIONS if version != "10.3.0"}
EVERY = [
    (path, recipe, base, version)
    for path in SPECS
    for line, version in VERSIONS.items()
    for recipe, base in sorted({*native(line), *((recipe, "fp32") for recipe, _ in native(line))})
]
# Each model with each recipe once, versions and bases by turns, and one model with all of them in float32;
# SPECRT_ALL_PAIRS=1: every one with every other.
BY_PAIR: dict[tuple[Path, str], list[tuple[Path, str, str, str]]] = {}
for _case in EVERY:
    BY_PAIR.setdefault(_case[:2], []).append(_case)
SOME = [cases[SPECS.index(path) % len(cases)] for (path, _), cases in BY_PAIR.items()]
SOME += [case for case in EVERY if case[0] == ALL and (case[2] == "fp32" or case[3] in ("8.6.0", "11.4.0"))]
CASES = sorted(set(EVERY if os.environ.get("SPECRT_ALL_PAIRS") else SOME))


def close(got: torch.Tensor, expected: torch.Tensor, bound: float, exact: bool, what: str) -> None:
    assert got.dtype == expected.dtype
    difference, size = (rows.double().reshape(-1, rows.shape[-1]) for rows in (got - expected, expected))
    assert difference.norm() <= bound * size.norm().clamp(min=1e-30), what
    if exact:
        each = difference.norm(dim=-1) / size.norm(dim=-1).clamp(min=1e-30)
        assert each.median() <= EXACT, what


@pytest.mark.parametrize(("path", "recipe", "base", "version"), CASES, ids=lambda item: getattr(item, "stem", item))
def test_emitted(path: Path, recipe: str, base: str, version: str) -> None:
    model = low_bit(path, recipe, base)
    assert model.plan.linears
    pieces = cut(model.graph, baked=model.baked)
    weights = {name: tensor.make(model.weights) for name, tensor in pieces.tensors.items()}
    record = recorded(recorder.module(version), dialect(version), baked(pieces, weights))
    exact = base == "fp32"
    wide = load_recipe(recipe).bound.relative * SENSITIVE.get(path.stem, UNTRAINED)
    bound = EMULATED.get(recipe, OWN_ROUNDING.get(recipe, 1e-4)) if exact else wide

    def engine(graph: Graph, inputs: Values) -> dict[str, torch.Tensor]:
        got, expected = record(graph, inputs), run(graph, inputs, weights.__getitem__)
        for port, tensor in got.items():
            close(tensor, expected[port], bound, exact, port)
        return got

    states, expected_states = states_of(pieces.graph), states_of(pieces.graph)
    for batch in batches(model.model):
        got = run_plan(pieces, batch, weights, states, engine)
        expected = run(pieces.graph, batch, weights.__getitem__, expected_states)
        for name, tensor in got.items():
            rows = batch["positions"] >= 0 if model.model.role == "encoder" and tensor.ndim == 3 else slice(None)
            close(tensor[rows], expected[name][rows], bound, False, name)


def layers_of(recipe: str, version: str) -> Mapping[str, int]:
    """How often each kind of layer occurs in the engines of a small model."""
    model = low_bit(ALL, recipe, "fp32")
    pieces = cut(model.graph, baked=model.baked)
    weights = {name: tensor.make(model.weights) for name, tensor in pieces.tensors.items()}
    trt, line, found = recorder.module(version), dialect(version), dict[str, int]()
    for segment in pieces.segments.values():
        network = create_network(trt, trt.Builder(trt.Logger()), line)
        emitter = emit(trt, segment.graph, network, line, baked(pieces, weights))
        network.finish()
        assert emitter.scope
        for layer in network._layers:
            found[layer._kind] = found.get(layer._kind, 0) + 1
            if layer._kind == "add_matrix_multiply":
                kinds = {getattr(tensor._source, "_kind", "an input") for tensor in layer._inputs}
                found["products of codes"] = found.get("products of codes", 0) + (kinds == {"add_dequantize"})
                found["products"] = found.get("products", 0) + 1
    return found


def test_codes_are_multiplied_as_codes() -> None:
    """Nothing stands between a product and the codes of its operands, but for the head, which is not quantized."""
    for recipe, version in (("w8a8_sq_static", "8.6.0"), ("fp8", "10.0.1"), ("nvfp4", "10.8.0"), ("mxfp8", "11.4.0")):
        found = layers_of(recipe, version)
        assert found["products"] - 1 == found["products of codes"] > 0, recipe
    assert layers_of("w4a16", "10.0.1")["products of codes"] == 0


def test_inputs_are_quantized_by_blocks_in_one_layer() -> None:
    found = layers_of("nvfp4", "10.8.0")
    assert found["add_dynamic_quantize"] == 3 * 4  # of each layer: qkv's, out's, gate and up's, down's input
    assert "add_quantize" not in found


PRODUCT = parse("""graph segment(%x: f16[T,64], %c: i8[8,64], %s: f32[8,1], %t: f32[1]) {
  dim T in 1..16..512
  %q: i8[T,64] = quantize(%x, %t) {dtype = "i8"}
  %r: f16[T,64] = dequantize(%q, %t) {dtype = "f16"}
  %w: f16[8,64] = dequantize(%c, %s) {dtype = "f16"}
  %y: f16[T,8] = matmul(%r, %w) {transpose_b = true}
  return y = %y
}
""")


def test_the_weakly_typed_builder_is_told_of_codes() -> None:
    trt = recorder.module("8.6.0")
    config = trt.Builder(trt.Logger()).create_builder_config()
    configure(trt, config, PRODUCT, dialect("8.6.0"), BuildOptions())
    assert config._flags == {"OBEY_PRECISION_CONSTRAINTS", "FP16", "INT8"}


def test_scales_of_blocks_must_be_constants() -> None:
    graph = parse("""graph segment(%x: f16[T,64], %c: i4[8,64], %s: f16[8,1]) {
      dim T in 1..16..512
      %w: f16[8,64] = dequantize(%c, %s) {dtype = "f16", block = (1, 64)} @ specs/models/model.yaml:38:17
      %y: f16[T,8] = matmul(%x, %w) {transpose_b = true}
      return y = %y
    }
    """)
    trt, line = recorder.module("10.0.1"), dialect("10.0.1")
    network = create_network(trt, trt.Builder(trt.Logger()), line)
    check_raises("LOWER-040", emit, trt, graph, network, line)


def steps_of(recipe: str, *, baked: bool) -> list[str]:
    """What the steps of a small model are for SM90, with TensorRT 10.8."""
    model = tiny(ALL, "fp16", wide=True)
    change = quantize(load_recipe(recipe), (), None)
    graph, _ = run_passes(model.built.graph, pipeline("decoder", "fp16", "sm90", (change,)))
    steps = cut(graph, baked=baked, kernels=KernelSteps("tensorrt-10.8", 90, baked=baked)).steps
    return sorted({step.kind for step in steps})


def test_products_of_blocks_are_engines_where_those_hold_their_weights() -> None:
    assert steps_of("w4a16", baked=False) == ["kernel", "program"]
    assert steps_of("w4a16", baked=True) == ["engine", "kernel"]
    assert steps_of("w4a16_gptq", baked=True) == ["kernel", "program"]  # zero points
    assert steps_of("w8a8_sq_static", baked=False) == ["engine", "kernel"]


def test_the_recorder_refuses_what_tensorrt_does() -> None:
    trt = recorder.module("10.8.0")
    network: Any = trt.Builder(trt.Logger()).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.DataType.FLOAT, (-1, 64))
    scale = network.add_input("s", trt.DataType.FLOAT, (1,))
    with pytest.raises(AssertionError, match="no constant of the build"):
        network.add_quantize(x, scale, trt.DataType.INT8)
    half = network.add_cast(scale, trt.DataType.HALF).get_output(0)
    with pytest.raises(AssertionError, match="quantize of FLOAT by HALF"):
        network.add_quantize(x, half, trt.DataType.INT8)
    old = recorder.module("8.6.0")
    with pytest.raises(TypeError, match="add_quantize"):
        old.Builder(old.Logger()).create_network(1).add_quantize(x, scale, trt.DataType.INT8)


def test_every_native_recipe_is_emitted_somewhere() -> None:
    """What the toolchains' files promise is what cases are made of."""
    promised = {(line.toolchain, recipe) for line in DIALECTS for recipe, _ in native(line.toolchain)}
    tested = {(dialect(version).toolchain, recipe) for _, recipe, _, version in SOME}
    assert tested == promised
    assert {recipe for _, recipe in promised} >= {"w8a8_sq_static", "fp8", "w4a16", "nvfp4", "mxfp8"}
    assert not any("block" in eq.attr for eq in walk(PRODUCT.equations))
