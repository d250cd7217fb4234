"""Models without any engine, in a precision that the toolchain has none for or because nothing else is wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compiler.ir.parser import parse
from compiler.ir.verify import verify
from compiler.lower.low_bit import KernelSteps
from compiler.lower.tensorrt.cut import cut
from specs.precision import load_recipe
from tests.golden_errors import ROOT, check_raises
from tests.kernels.execute import execute
from tests.kernels.test_low_bit import INPUTS_TOO, WEIGHTS_ONLY, check, off, pieces_of
from tests.tensorrt.driver import interpreted, padded
from tests.tensorrt.models import SPECS, tiny

ALONE = KernelSteps("tensorrt-8.6", 90, alone=True)
MODELS = ROOT / "specs" / "models"
# Programs in float16 are within 0.0009 of the norm here. Of a number bfloat16 keeps 2^-8 where float16 keeps 2^-11:
# eight times as much, and half as much again for what these few models do not show.
BF16 = 1.2e-2


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_each_family(path: Path) -> None:
    """Every segment is a program, at every number of rows. Layers with experts are not among deepseek_v3's few here."""
    assert {step.kind for step in cut(tiny(path, "bf16").graph, kernels=ALONE).steps} <= {"program", "kernel"}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("llama", "bf16"),
        ("bloom", "bf16"),
        ("gpt_oss", "bf16"),
        ("chatglm", "bf16"),
        ("deepseek_v2", "bf16"),
        ("gemma3", "fp16"),
    ],
)
def test_what_programs_compute(name: str, precision: str) -> None:
    model = tiny(MODELS / f"{name}.yaml", precision)
    pieces = cut(model.graph, kernels=ALONE)
    weights = {key: tensor.make(model.weights) for key, tensor in pieces.tensors.items()}
    bound = BF16 if precision == "bf16" else WEIGHTS_ONLY
    assert check(pieces, weights, bound) == [step.kind for step in pieces.steps].count("program")


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_encoder_is_one_program(name: str) -> None:
    """Rows of two lengths, what is padded included; several layers are off by more than one."""
    model = tiny(MODELS / f"{name}.yaml", "bf16")
    (step,), (segment,) = (pieces := cut(model.graph, kernels=ALONE)).steps, pieces.segments.values()
    assert step.kind == "program"
    inputs = padded(pieces.graph, [5, 3])
    for port, value in step.inputs.items():
        if value.startswith("weight:"):
            inputs[port] = pieces.tensors[value.removeprefix("weight:")].make(model.weights)
    got, expected = execute(segment.graph, inputs, 16), interpreted(segment.graph, inputs)
    for port, value in expected.items():
        assert off(got[port], value) <= 2 * BF16, port


HEADS = """graph segment(%x: f16[T,96], %cos: f32[T,3], %sin: f32[T,3], %at: i32[T], %end: i32[B], %rows: i32[T]) {
  dim T in 1..64..256
  dim B in 1..1..4
  %h: f16[T,4,24] = reshape(%x) {shape = ("T", 4, 24)}
  %a: f16[T,4,10] = slice(%h) {axis = -1, start = 2, stop = 12}
  %b: f16[T,4,7] = slice(%h) {axis = -1, start = 12, stop = 19}
  %half: f16[T,4,10] = rotate(%a, %cos, %sin) {style = "half"}
  %pairs: f16[T,4,7] = rotate(%b, %cos, %sin) {style = "interleaved"}
  %y: f16[T,4,17] = concat(%half, %pairs) {axis = -1}
  %w: f16[T,4,10] = mul(%half, 2.0)
  %last: i32[T] = gather(%end, %rows)
  %before: bool[T] = compare(%at, %last) {kind = "lt"}
  %z: i32[T] = where(%before, %at, %last)
  return y = %y, w = %w, z = %z
}
"""


def test_heads_that_are_cut_turned_and_joined() -> None:
    """Each element from where it lies: rotations of some dims in both styles, beside a choice between whole numbers."""
    graph, generator = parse(HEADS), torch.Generator().manual_seed(5)
    verify(graph)
    angles = torch.rand(6, 3, generator=generator) * 6
    inputs = {
        "x": torch.randn(6, 96, generator=generator).half(), "cos": angles.cos(), "sin": angles.sin(),
        "at": torch.arange(6, dtype=torch.int32), "end": torch.tensor([2, 9], dtype=torch.int32),
        "rows": torch.tensor([0, 0, 0, 0, 1, 1], dtype=torch.int32),
    }  # fmt: skip
    got, expected = execute(graph, inputs, 16), interpreted(graph, inputs)
    assert torch.equal(got["z"], expected["z"])
    for port in ("y", "w"):  # a product and a sum may be one instruction here: a unit in the last place of float16
        assert torch.allclose(got[port].float(), expected[port].float(), rtol=2.0**-10, atol=2.0**-12)


WITHIN = """graph segment(%x: {0}[B,S,96], %positions: i32[B,S]) {{
  dim B in 1..1..4
  dim S in 1..64..256
  %a: {0}[B,S,64] = slice(%x) {{axis = -1, start = 0, stop = 64}}
  %b: {0}[B,S,16] = slice(%x) {{axis = -1, start = 64, stop = 80}}
  %c: {0}[B,S,16] = slice(%x) {{axis = -1, start = 80, stop = 96}}
  %q: {0}[B,S,8,8] = reshape(%a) {{shape = ("B", "S", 8, 8)}}
  %k: {0}[B,S,2,8] = reshape(%b) {{shape = ("B", "S", 2, 8)}}
  %v: {0}[B,S,2,8] = reshape(%c) {{shape = ("B", "S", 2, 8)}}
  %y: {0}[B,S,8,8] = attention(%q, %k, %v, %positions) {{scale = 0.4, {1}}}
  return y = %y
}}
"""


@pytest.mark.parametrize("length", [3, 64, 100])
@pytest.mark.parametrize("options", ["causal = false", "causal = true, window = 9", "causal = false, softcap = 2.0"])
def test_attention_within_rows(options: str, length: int) -> None:
    """Tiles that begin in one row and end in the next, heads that share a key, rows that are padded or empty."""
    graph = parse(WITHIN.format("f16", options))
    verify(graph)
    x = torch.randn(4, length, 96, generator=torch.Generator().manual_seed(3)).half()
    at = torch.arange(length, dtype=torch.int32).repeat(4, 1)
    lengths = torch.tensor([length, 1, length // 2, 0])
    inputs = {"x": x, "positions": torch.where(at < lengths[:, None], at, -1)}
    got, expected = execute(graph, inputs, 16)["y"], interpreted(graph, inputs)["y"]
    # weights are rounded to float16 before their product with values; values are of size 1 to 3
    assert torch.allclose(got.float(), expected.float(), rtol=0, atol=4 * 2.0**-11 * 3)


@pytest.mark.parametrize(("recipe", "bound"), [("w4a16", BF16), ("w8a8_sq_static", INPUTS_TOO)])
def test_codes_beside_bfloat16(recipe: str, bound: float) -> None:
    """Also of a recipe that engines have products for."""
    asked = load_recipe(recipe).model_copy(update={"base": ("bf16",)})
    pieces, weights, _ = pieces_of("llama", asked, precision="bf16", kernels=ALONE)
    assert check(pieces, weights, bound) == 4


def test_a_precision_that_kernels_do_not_multiply() -> None:
    check_raises("LOWER-039-alone", cut, tiny(MODELS / "llama.yaml", "fp32").graph, kernels=ALONE)
