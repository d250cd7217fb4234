"""Segments as kernels for few rows, in Triton's interpreter, against the IR's."""

from __future__ import annotations

import pytest
import torch

from compiler.ir.core import Graph
from compiler.ir.interpreter import run as interpret
from compiler.ir.interpreter import torch_dtype
from compiler.ir.parser import parse
from compiler.ir.verify import verify
from compiler.kernels.row_source import RefusedError
from compiler.kernels.rows import program_of
from compiler.lower.tensorrt.cut import cut
from tests.conformance.tolerances import tolerance
from tests.golden_errors import ROOT
from tests.kernels.execute import execute
from tests.tensorrt.models import tiny

SEGMENT = """graph segment(%a: f16[T,2,16], %x: f16[T,32], %o: f16[32,32], %norm: f16[32], %up: f16[96,32]) {
  dim T in 1..8..64
  %joined: f16[T,32] = reshape(%a) {shape = ("T", 32)}
  %out: f16[T,32] = matmul(%joined, %o) {transpose_b = true}
  %y: f16[T,32] = add(%x, %out)
  %n: f16[T,32] = rms_norm(%y, %norm) {eps = 1e-05}
  %h: f16[T,96] = matmul(%n, %up) {transpose_b = true}
  return y = %y, h = %h
}"""

GATED = """graph segment(%h: f16[T,96], %x: f16[T,32], %down: f16[32,48], %b: f16[32], %w: f16[32], %s: f16[32],
                      %select: i32[N], %head: f16[50,32]) {
  dim T in 1..8..64
  dim N in 1..2..64
  %gate: f16[T,48] = slice(%h) {axis = -1, start = 0, stop = 48}
  %up: f16[T,48] = slice(%h) {axis = -1, start = 48, stop = 96}
  %act: f16[T,48] = silu(%gate)
  %hidden: f16[T,48] = mul(%act, %up)
  %d: f16[T,32] = matmul(%hidden, %down) {transpose_b = true}
  %db: f16[T,32] = add(%d, %b)
  %z: f16[T,32] = add(%db, %x)
  %rows: f16[N,32] = gather(%z, %select)
  %n: f16[N,32] = layer_norm(%rows, %w, %s) {eps = 1e-05}
  %y: f16[N,50] = matmul(%n, %head) {transpose_b = true}
  %logits: f32[N,50] = cast(%y) {dtype = "f32"}
  return logits = %logits
}"""

POSITIONS = """graph segment(%positions: i32[T], %table: f32[8,12]) {
  dim T in 1..8..64
  %freq: f32[6] = const() {value = (1.0, 0.17782793939113617, 0.03162277862429619, 0.005, 0.001, 0.0001778)}
  %at: f32[T] = cast(%positions) {dtype = "f32"}
  %at.2: f32[T,1] = reshape(%at) {shape = ("T", 1)}
  %angle: f32[T,6] = mul(%at.2, %freq)
  %cos: f32[T,6] = cos(%angle)
  %sin: f32[T,6] = sin(%angle)
  %zero: i32[T] = maximum(%positions, 0)
  %place: i32[T] = add(%zero, 2)
  %x: f32[T,12] = gather(%table, %place)
  return cos = %cos, sin = %sin, x = %x
}"""

UNARY = ("relu", "sigmoid", "tanh", "silu", "exp", "gelu {approximate = true}", "gelu {approximate = false}")


def check(text: str, dtype: str = "f16", rows: int = 16, tokens: int = 5) -> None:
    check_graph(parse(text.replace("f16", dtype)), dtype, rows, tokens)


def check_graph(graph: Graph, dtype: str, rows: int, tokens: int) -> None:
    verify(graph)
    generator = torch.Generator().manual_seed(5)
    sizes = {"T": tokens, "N": 3, "B": 5}
    inputs = {}
    for value in graph.inputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in value.type.shape]
        if value.type.dtype == "i32":
            inputs[value.name] = torch.tensor([4, 0, 2, 1, 3], dtype=torch.int32)[: shape[0]]
        else:
            scale = shape[-1] ** -0.5 if len(shape) == 2 and isinstance(value.type.shape[0], int) else 1.0
            inputs[value.name] = (torch.randn(shape, generator=generator) * scale).to(torch_dtype(value.type.dtype))
    expected = interpret(graph, inputs, {}.__getitem__, {})
    bound = tolerance("matmul", dtype)
    for port, found in execute(graph, inputs, rows).items():
        difference = (found.double() - expected[port].double()).abs()
        assert (difference <= bound.absolute + bound.relative * expected[port].double().abs()).all(), port


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("text", [SEGMENT, GATED], ids=["attention out", "gate, bias, rows, head"])
def test_segments(text: str, dtype: str) -> None:
    check(text, dtype)


def test_positions() -> None:
    """Angles, constants in the text, and a place that is computed and looked up in one launch."""
    check(POSITIONS, "f32")
    (call,) = program_of(parse(POSITIONS), 16, 90).calls
    assert set(call.places.values()) == {"positions", "table", "cos", "sin", "x"}


def test_several_norms_in_one_group() -> None:
    check("""graph segment(%x: f16[T,24], %w: f16[24], %b: f16[24], %g: f16[24]) {
      dim T in 1..8..64
      %first: f16[T,24] = layer_norm(%x, %w, %b) {eps = 1e-05}
      %second: f16[T,24] = rms_norm(%first, %g) {eps = 1e-05}
      %sum: f16[T,24] = add(%first, %second)
      %third: f16[T,24] = layer_norm(%sum, %g, %b) {eps = 1e-05}
      return first = %first, second = %second, sum = %sum, third = %third
    }""")


@pytest.mark.parametrize("name", ["bloom", "chatglm", "gemma2", "gptj", "phi", "qwen3"])
def test_segments_of_models(name: str) -> None:
    """Every segment that has a program: other norms, biases, activations and wirings than above."""
    made = 0
    for segment in cut(tiny(ROOT / "specs" / "models" / f"{name}.yaml", "fp16").graph).segments.values():
        try:
            program_of(segment.graph, 16, 90)
        except RefusedError:
            continue
        check_graph(segment.graph, "f16", 16, 5)
        made += 1
    assert made


def test_more_rows_than_a_tile_has() -> None:
    check(SEGMENT, rows=1024, tokens=150)


@pytest.mark.parametrize("tokens", [1, 5])
def test_routers(tokens: int) -> None:
    """Scores, the chosen, their weights; equal scores, of which the first is chosen."""
    check(
        """graph segment(%x: f16[T,32], %w: f16[10,32], %s: f16[T,4]) {
      dim T in 1..8..64
      %r: f16[T,10] = matmul(%x, %w) {transpose_b = true}
      %p: f16[T,10] = softmax(%r)
      %top: i32[T,3] = top_k(%p) {k = 3}
      %chosen: f16[T,3] = take(%p, %top)
      %wide: f32[T,3] = cast(%chosen) {dtype = "f32"}
      %sum: f32[T,1] = sum(%wide)
      %narrow: f16[T,1] = cast(%sum) {dtype = "f16"}
      %y: f16[T,3] = div(%chosen, %narrow)
      %same: f16[T,4] = mul(%s, 0.0)
      %first: i32[T,2] = top_k(%same) {k = 2}
      return top = %top, y = %y, sum = %narrow, first = %first
    }""",
        tokens=tokens,
    )


@pytest.mark.parametrize("heads", [2, 3])
def test_norms_of_heads(heads: int) -> None:
    check(f"""graph segment(%x: f16[T,{heads * 16}], %w: f16[16], %b: f16[16]) {{
      dim T in 1..8..64
      %heads: f16[T,{heads},16] = reshape(%x) {{shape = ("T", {heads}, 16)}}
      %first: f16[T,{heads},16] = rms_norm(%heads, %w) {{eps = 1e-05}}
      %second: f16[T,{heads},16] = layer_norm(%first, %w, %b) {{eps = 1e-05}}
      return first = %first, second = %second
    }}""")


def test_functions() -> None:
    lines = [f"%y{i}: f16[T,24] = {text.split()[0]}(%x) {text.partition(' ')[2]}" for i, text in enumerate(UNARY)]
    outputs = ", ".join(f"y{i} = %y{i}" for i in range(len(UNARY)))
    check("graph g(%x: f16[T,24]) {\n  dim T in 1..8..64\n  " + "\n  ".join(lines) + f"\n  return {outputs}\n}}")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("%y: f16[T,16] = matmul(%x, %x2) {transpose_b = true}", "two activations"),
        ("%y: f16[T,1] = mean(%x)", "mean"),
        ('%h: f16[T,4,4] = reshape(%x) {shape = ("T", 4, 4)}\n  %y: f16[T,4,4] = softmax(%h)', "groups of 4"),
        (
            '%h: f16[T,4,4] = reshape(%x) {shape = ("T", 4, 4)}\n  %y: f16[T,4,4] = mul(%h, %w)',
            "rows of 4 and 16",
        ),
    ],
)
def test_what_has_no_rule_is_refused(line: str, why: str) -> None:
    text = (
        f"graph g(%x: f16[T,16], %x2: f16[T,16], %w: f16[4]) {{\n  dim T in 16..16..16\n  {line}\n  return y = %y\n}}"
    )
    with pytest.raises(RefusedError, match=why):
        program_of(parse(text), 16, 90)
