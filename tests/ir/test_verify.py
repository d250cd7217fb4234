"""Each numbered constraint of the verifier: a graph that breaks it, and what is said."""

from __future__ import annotations

from dataclasses import replace

from compiler.ir import Block, Equation, Graph, Sym, TensorType, Value
from compiler.ir.parser import parse
from compiler.ir.verify import verify
from tests.golden_errors import check_raises

_GOOD = """
graph g(%x: f32[B,8]) {
  dim B in 1..2..4
  %w: f32[8,8] = weight() {name = "w"} @ model.yaml:3:5
  %y: f32[B,8] = matmul(%x, %w) {transpose_b = true} @ model.yaml:4:5
  %z: f32[B,8] = repeat(%y) {count = 3} (%p: f32[B,8]) => { @ model.yaml:5:3
    %a: f32[8] = weight() {name = "layers.{i}.a"} @ model.yaml:6:7
    %q: f32[B,8] = mul(%p, %a) @ model.yaml:7:7
    yield %q
  }
  return out = %z
}
"""


def good() -> Graph:
    return parse(_GOOD)


def edit(old: str, new: str) -> Graph:
    assert old in _GOOD
    return parse(_GOOD.replace(old, new))


def body_of(graph: Graph) -> Block:
    body = graph.equations[-1].body
    assert body is not None
    return body


def with_body(body: Block) -> Graph:
    graph = good()
    return graph.with_equations((*graph.equations[:-1], replace(graph.equations[-1], body=body)))


def test_the_good_graph_is_good() -> None:
    verify(good())


def test_c1_a_value_is_defined_before_it_is_used() -> None:
    weight, product, loop = good().equations
    check_raises("IR-003-c1", verify, good().with_equations((product, weight, loop)))


def test_c1_a_value_of_a_body_is_not_seen_outside() -> None:
    graph = good()
    exp = Equation("exp", (body_of(graph).results[0],), (Value("e", TensorType("f32", ("B", 8))),))
    check_raises("IR-003-c1-inside-a-body", verify, graph.with_equations((*graph.equations, exp)))


def test_c2_names_are_unique_also_between_blocks() -> None:
    body = body_of(good())
    parameter = replace(body.params[0], name="y")
    scale, product = body.equations
    again = replace(product, args=(parameter, scale.result))
    check_raises("IR-003-c2", verify, with_body(replace(body, params=(parameter,), equations=(scale, again))))


def test_c3_the_stated_type_is_the_inferred_one() -> None:
    graph = edit("%y: f32[B,8] = matmul", "%y: f32[8,B] = matmul")
    check_raises("IR-003-c3", verify, graph)


def test_c3_a_use_has_the_type_of_the_definition() -> None:
    graph = good()
    weight, product, loop = graph.equations
    wrong = replace(product, args=(Value("x", TensorType("f16", ("B", 8))), weight.result))
    check_raises("IR-003-c3-use", verify, graph.with_equations((weight, wrong, loop)))


def test_c4_an_operation_is_known() -> None:
    check_raises("IR-003-c4-unknown", verify, edit("matmul(%x, %w)", "matmull(%x, %w)"))


def test_c4_operands_have_the_types_of_the_signature() -> None:
    check_raises("IR-003-c4-operands", verify, edit("mul(%p, %a)", "rms_norm(%p, %p) {eps = 1e-05}"))


def test_c4_the_number_of_operands_is_that_of_the_signature() -> None:
    check_raises("IR-003-c4-count", verify, edit("mul(%p, %a)", "mul(%p)"))


def test_c4_attributes_are_those_of_the_signature() -> None:
    check_raises("IR-003-c4-attribute", verify, edit("transpose_b", "transposed"))
    check_raises("IR-003-c4-attribute-type", verify, edit("transpose_b = true", "transpose_b = 1"))
    check_raises("IR-003-c4-attribute-missing", verify, edit('weight() {name = "w"}', "weight()"))


def test_c4_an_equation_has_a_result() -> None:
    graph = good()
    weight, *rest = graph.equations
    check_raises("IR-003-c4-no-result", verify, graph.with_equations((replace(weight, results=()), *rest)))


def test_c4_a_constant_is_what_its_type_says() -> None:
    graph = edit('weight() {name = "w"}', "const() {value = ((1.0), (2.0))}")
    check_raises("IR-003-c4-constant", verify, graph)


def test_c5_a_body_carries_what_comes_in() -> None:
    body = body_of(good())
    check_raises("IR-003-c5-results", verify, with_body(replace(body, results=(body.equations[0].result,))))
    check_raises("IR-003-c5-parameters", verify, with_body(replace(body, params=())))


def test_c5_bodies_do_not_nest() -> None:
    graph = edit(
        "mul(%p, %a) @ model.yaml:7:7",
        "repeat(%p) {count = 2} (%r: f32[B,8]) => { %s: f32[B,8] = mul(%r, %a) yield %s }",
    )
    check_raises("IR-003-c5-nested", verify, graph)


def test_c6_a_dim_is_declared_once_with_a_range() -> None:
    graph = good()
    check_raises("IR-003-c6-undeclared", verify, replace(graph, dims=()))
    check_raises("IR-003-c6-twice", verify, replace(graph, dims=graph.dims * 2))
    check_raises("IR-003-c6-range", verify, replace(graph, dims=(Sym("B", 4, 2, 8),)))
    check_raises("IR-003-c6-zero", verify, replace(graph, inputs=(Value("x", TensorType("f32", ("B", 0))),)))


def test_c7_names_of_weights_depend_on_the_round_inside_repeat_only() -> None:
    check_raises("IR-003-c7-inside", verify, edit("layers.{i}.a", "layers.0.a"))
    check_raises("IR-003-c7-outside", verify, edit('name = "w"', 'name = "layers.{i}.w"'))


def test_c7_one_weight_has_one_type() -> None:
    graph = edit("%y: f32[B,8]", '%v: f32[8,4] = weight() {name = "w"} @ model.yaml:9:9\n%y: f32[B,8]')
    check_raises("IR-003-c7-type", verify, graph)


def test_c8_outputs_are_top_level_values_with_unique_names() -> None:
    graph = good()
    inner = body_of(graph).results[0]
    check_raises("IR-003-c8-inner", verify, replace(graph, outputs=(("out", inner),)))
    check_raises("IR-003-c8-twice", verify, replace(graph, outputs=graph.outputs * 2))


def test_c9_only_repeat_has_a_body() -> None:
    graph = good()
    weight, product, loop = graph.equations
    check_raises("IR-003-c9-lacks", verify, graph.with_equations((weight, product, replace(loop, body=None))))
    extra = replace(product, body=body_of(graph))
    check_raises("IR-003-c9-has", verify, graph.with_equations((weight, extra, loop)))


def test_the_pass_that_broke_a_graph_is_named() -> None:
    check_raises("IR-003-after", verify, edit("mul(%p, %a)", "mul(%p)"), "fuse_everything")
