"""Experts as launches, in Triton's interpreter, against the IR's: sorted rows, grouped products, the weighted sum."""

from __future__ import annotations

import math

import pytest
import torch

from compiler.ir.core import Graph
from compiler.ir.formats import RANGE, round_to
from compiler.ir.interpreter import run as interpret
from compiler.ir.interpreter import torch_dtype
from compiler.ir.parser import parse
from compiler.ir.verify import verify
from compiler.kernels.build import SHARED, build
from compiler.kernels.expert_program import expert_equations, expert_program
from compiler.kernels.row_source import RefusedError
from compiler.kernels.rows import program_of
from compiler.lower.partition import partition
from compiler.lower.segments import engine_segment
from compiler.lower.tensorrt.cut import cut
from compiler.passes.unroll import unroll
from tests.conformance.tolerances import tolerance
from tests.golden_errors import ROOT
from tests.kernels.execute import execute
from tests.kernels.test_low_bit import SM90, off
from tests.tensorrt.driver import Values, interpreted, packed, run_plan, states_of
from tests.tensorrt.models import tiny

GATED = """graph experts(%x: f16[T,32], %gate: f16[4,48,32], %up: f16[4,48,32], %down: f16[4,32,48], %chosen: i32[T,2],
                         %weights: f16[T,2]) {
  dim T in 1..8..64
  %row: f16[T,1,32] = reshape(%x) {shape = ("T", 1, 32)}
  %g: f16[T,2,48] = gather_matmul(%row, %gate, %chosen)
  %u: f16[T,2,48] = gather_matmul(%row, %up, %chosen)
  %act: f16[T,2,48] = silu(%g)
  %hidden: f16[T,2,48] = mul(%act, %u)
  %d: f16[T,2,32] = gather_matmul(%hidden, %down, %chosen)
  %each: f16[T,1,2] = reshape(%weights) {shape = ("T", 1, 2)}
  %sum: f16[T,1,32] = matmul(%each, %d)
  return y = %sum
}"""

FAMILIES = (("gpt_oss", "fp16"), ("gpt_oss", "fp32"), ("mixtral", "fp32"), ("qwen2_moe", "fp16"), ("qwen3_moe", "fp32"))


def parts_of(graph: Graph) -> list[Graph]:
    """The experts of a graph, as they would be cut out."""
    whole = unroll(graph)
    owner = expert_equations(whole.equations)
    pieces = partition(whole, lambda equation: owner.get(equation.results[0].name))
    return [engine_segment(piece.graph).graph for piece in pieces if piece.kind == "step"]


def check(graph: Graph, rows: int = 16, tokens: int = 5, chosen: torch.Tensor | None = None) -> None:
    verify(graph)
    generator = torch.Generator().manual_seed(5)
    experts = next(value.type.shape[0] for value in graph.inputs if value.type.rank == 3 and value.type.shape[0] != "T")
    inputs = {}
    for value in graph.inputs:
        shape = [tokens if isinstance(dim, str) else dim for dim in value.type.shape]
        if value.type.dtype == "i32":
            draws = [torch.randperm(int(experts), generator=generator)[: shape[-1]] for _ in range(tokens)]
            inputs[value.name] = torch.stack(draws).int() if chosen is None else chosen
        elif value.type.dtype in RANGE:
            low, high = RANGE[value.type.dtype]
            inputs[value.name] = round_to(torch.rand(shape, generator=generator) * (high - low) + low, value.type.dtype)
        elif value.name.endswith("s") and value.type.rank == 3:  # scales: what brings codes to about a tenth
            of = next(other.type.dtype for other in graph.inputs if other.name == value.name[:-1] + "c")
            exponent = torch.randint(-2, 1, shape, generator=generator) - math.frexp(RANGE[of][1])[1] - 2
            inputs[value.name] = (
                (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
                if value.type.dtype == "f8e8m0"
                else torch.exp2(exponent).to(torch_dtype(value.type.dtype))
            )
        else:
            scale = shape[-1] ** -0.5 if isinstance(value.type.shape[0], int) else 1.0
            inputs[value.name] = (torch.randn(shape, generator=generator) * scale).to(torch_dtype(value.type.dtype))
    expected = interpret(graph, inputs, {}.__getitem__, {})
    for port, found in execute(graph, inputs, rows).items():
        dtype = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[found.dtype]
        bound = tolerance("matmul", dtype)
        difference = (found.double() - expected[port].double()).abs()
        excess = difference - bound.absolute - bound.relative * expected[port].double().abs()
        assert excess.max() <= 0, f"{port} off by {difference.max():.3g}"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(("rows", "tokens"), [(16, 1), (16, 5), (64, 40)])
def test_gated_experts(dtype: str, rows: int, tokens: int) -> None:
    check(parse(GATED.replace("f16", dtype)), rows, tokens)


def test_many_rows() -> None:
    """Tiles of 64 rows; more choices than the sort looks at together, and experts with several tiles."""
    check(parse(GATED), 1024, 530)


@pytest.mark.parametrize("who", [[0, 0], [3, 3], [1, 2]])
def test_all_rows_choose_the_same(who: list[int]) -> None:
    check(parse(GATED), 16, 16, torch.tensor([who] * 16, dtype=torch.int32))


def test_choices_of_rows_that_nobody_reads_may_be_anything() -> None:
    graph, tokens = parse(GATED), 6
    inputs = {value.name: torch.zeros([tokens if dim == "T" else dim for dim in value.type.shape],
                                      dtype=torch_dtype(value.type.dtype)) for value in graph.inputs}  # fmt: skip
    inputs["chosen"] = torch.tensor([[0, 1], [-9, 7], [1 << 30, 2], [3, 0], [-(1 << 31), 1], [2, 2]], dtype=torch.int32)
    assert (execute(graph, inputs, 16)["y"] == 0).all()


@pytest.mark.parametrize(("name", "dtype"), FAMILIES)
def test_experts_of_models(name: str, dtype: str) -> None:
    parts = parts_of(tiny(ROOT / "specs" / "models" / f"{name}.yaml", dtype).graph)
    assert parts
    check(parts[0])
    check(parts[-1], tokens=3)  # of the last layer only the rows whose logits are wanted


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("silu(%g)", "softmax(%g)", "`softmax` beside experts"),
        ("gather_matmul(%row, %up, %chosen)", "gather_matmul(%row, %other, %chosen)", "matrices of several shapes"),
    ],
)
def test_what_has_no_rule_is_refused(old: str, new: str, why: str) -> None:
    text = GATED.replace(old, new).replace("%weights:", "%other: f16[5,48,32], %weights:")
    with pytest.raises(RefusedError, match=why):
        expert_program(parse(text), 16)


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_plan_has_the_experts_as_programs(name: str) -> None:
    """Logits of the whole plan, experts by their kernels, against experts in engines: prompts, then decoding."""
    model = tiny(ROOT / "specs" / "models" / f"{name}.yaml", "fp32")
    pieces = cut(model.graph, kernels=SM90)
    engines = {step.file for step in pieces.steps if step.kind == "engine"}
    experts = {
        segment.file
        for segment in pieces.segments.values()
        if any(eq.op == "gather_matmul" for eq in segment.graph.equations)
    }
    assert experts
    assert not experts & engines
    weights = {key: tensor.make(model.weights) for key, tensor in pieces.tensors.items()}

    def program(graph: Graph, inputs: Values) -> dict[str, torch.Tensor]:
        return execute(graph, dict(inputs), 16)

    plain, states = cut(model.graph), [states_of(pieces.graph) for _ in range(2)]
    for past, new in (([0, 0], [1, 4]), ([1, 4], [1, 1])):
        batch = packed(pieces.graph, past, new)
        got = run_plan(pieces, batch, weights, states[0], interpreted, program)["logits"]
        assert off(got, run_plan(plain, batch, weights, states[1], interpreted)["logits"]) < 1e-5


def test_matrices_that_are_made_in_the_graph_stay_with_their_engine() -> None:
    made = "  %made: f16[4,48,32] = mul(%gate, 2.0)\n  %row:"
    text = GATED.replace("  %row:", made, 1).replace("%row, %gate", "%row, %made")
    assert expert_equations(parse(text).equations) == {}
    assert len(expert_equations(parse(GATED).equations)) == len(parse(GATED).equations)


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral", "qwen3_moe"])
def test_a_router_has_kernels_beside_its_engine(name: str) -> None:
    pieces = cut(tiny(ROOT / "specs" / "models" / f"{name}.yaml", "fp16").graph, kernels=SM90)
    routers = [one.graph for one in pieces.segments.values() if any(eq.op == "top_k" for eq in one.graph.equations)]
    assert routers
    assert all(program_of(graph, 16, 90).calls for graph in routers)


def test_baked_engines_keep_their_experts() -> None:
    graph = tiny(ROOT / "specs" / "models" / "mixtral.yaml", "fp16").graph
    assert {step.kind for step in cut(graph, baked=True, kernels=SM90).steps} == {"engine", "kernel"}


def test_kernels_compile_for_every_architecture() -> None:
    parts = parts_of(tiny(ROOT / "specs" / "models" / "gpt_oss.yaml", "fp16").graph)
    launches = [call.launch for rows in (16,) for call in expert_program(parts[0], rows).calls]
    for architecture in (86,):  # the least shared memory
        for made in build(launches, architecture):
            assert made.shared <= SHARED[architecture]


@pytest.mark.parametrize("architecture", [70, 86, 90])
def test_codes_compile(architecture: int) -> None:
    """At few rows and at many, 4 bits and E4M3: by its bits where the compiler has no E4M3."""
    launches = {
        call.launch.text + str(call.launch.constants): call.launch
        for how in ("f4e2m1", "f8e4m3")
        for rows in (16, 1024)
        for call in expert_program(coded(CODES[how]), rows, architecture).calls
        if call.launch.name == "experts"
    }
    for made in build(list(launches.values()), architecture):
        assert made.shared <= SHARED[architecture]


CODES = {
    "i4": "i4, f16, 32", "u4": "u4, f16, 64", "i8": "i8, f32, 0", "f4e2m1": "f4e2m1, f8e8m0, 32", "rows": "u4, f16, 0",
    "f8e4m3": "f8e4m3, f32, 32", "f8e4m3 of rows": "f8e4m3, f32, 0",
}  # fmt: skip


def coded(how: str) -> Graph:
    """GATED with matrices of codes: type, type of scales, columns that share one (0: rows)."""
    codes, scale, group = how.split(", ")
    text = GATED.replace("32]", "64]").replace("48,64]", "96,64]").replace("f16[T,2,48]", "f16[T,2,96]")
    text = text.replace("%down: f16[4,32,48]", "%down: f16[4,64,96]").replace("f16[T,2,32]", "f16[T,2,64]")
    text = text.replace("f16[T,1,32]", "f16[T,1,64]").replace('("T", 1, 32)', '("T", 1, 64)')
    lines = []
    for name, outs, ins in (("gate", 96, 64), ("up", 96, 64), ("down", 64, 96)):
        size = 0 if int(group) > ins or ins % (int(group) or ins) else int(group)
        count = ins // size if size else 1
        zero = f", %{name}z: u4[4,{outs},{count}]" if codes == "u4" else ""
        text = text.replace(
            f"%{name}: f16[4,{outs},{ins}]",
            f"%{name}c: {codes}[4,{outs},{ins}], %{name}s: {scale}[4,{outs},{count}]{zero}",
        )
        block = f", block = (1, {size})" if size else ""
        third = f", %{name}z" if zero else ""
        lines.append(
            f'  %{name}: f16[4,{outs},{ins}] = dequantize(%{name}c, %{name}s{third}) {{dtype = "f16"{block}}}\n'
        )
    return parse(text.replace("  %row:", "".join(lines) + "  %row:", 1))


@pytest.mark.parametrize(("rows", "tokens"), [(16, 5), (64, 40), (1024, 200)])
@pytest.mark.parametrize("how", CODES)
def test_matrices_of_codes(how: str, rows: int, tokens: int) -> None:
    check(coded(CODES[how]), rows, tokens)
