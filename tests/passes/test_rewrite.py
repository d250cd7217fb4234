"""The rule engine: what patterns bind, when rules are refused, and what rewriting leaves as it was."""

from __future__ import annotations

import pytest

from compiler.ir import Graph, walk
from compiler.ir.parser import parse
from compiler.ir.verify import verify
from compiler.passes.pattern import Match, Scope, Search, named, read_pattern
from compiler.passes.rewrite import Rule, rewrite
from compiler.passes.runner import Log
from specs.errors import SpecRTError


def graph(body: str, result: str = "y") -> Graph:
    return parse(f"graph g(%x: f32[B,8], %z: f32[B,8]) {{ dim B in 1..1..4 {body} return y = %{result} }}")


def apply(rule: Rule, source: Graph) -> tuple[Graph, Log]:
    log = Log()
    done = rewrite(source, (rule,), log)
    verify(done)
    return done, log


def match(pattern: str, source: Graph) -> Match | None:
    read = read_pattern(pattern)
    search = Search(read, Scope(source.equations, tuple(value for _, value in source.outputs)))
    return search.match if search.start(((named(read.last), source.equations[-1].result),)) else None


SIGMOID = Rule(
    "sigmoid",
    before="%e = exp(%n) %n = sub(0.0, %x) %d = add(%e, 1.0) %y = div(1.0, %d)",
    after="%y = sigmoid(%x)",
)
_SIGMOID = """
    %n: f32[B,8] = sub(0.0, %x)
    %e: f32[B,8] = exp(%n)
    %d: f32[B,8] = add(1.0, %e)
    %y: f32[B,8] = div(1, %d)
"""


def test_operands_of_commutative_operations_match_both_ways_and_1_is_1_0() -> None:
    done, log = apply(SIGMOID, graph(_SIGMOID))
    (equation,) = done.equations
    assert (equation.op, equation.result.name) == ("sigmoid", "y")
    assert [hit.rule for hit in log.hits] == ["sigmoid"]


def test_true_is_not_1() -> None:
    assert match("%y = mul(%x, 1)", graph("%y: f32[B,8] = mul(%x, true)")) is None


def test_the_search_goes_back_where_the_first_way_fails_later() -> None:
    # %a could be either operand; only the second way leaves %a the one that `tanh` reads.
    source = graph("%a: f32[B,8] = exp(%x) %b: f32[B,8] = exp(%z) %t: f32[B,8] = tanh(%b) "
                   "%s: f32[B,8] = add(%a, %b) %y: f32[B,8] = mul(%s, %t)")  # fmt: skip
    found = match("%a = exp(%p) %b = exp(%q) %s = add(%a, %b) %t = tanh(%a) %y = mul(%s, %t)", source)
    assert found is not None
    assert (found.value("a").name, found.value("p").name) == ("b", "z")


def test_holes_bind_attributes_literals_and_parts_of_tuples() -> None:
    source = graph('%a: f32[B,2,4] = reshape(%x) {shape = ("B", 2, 4)} %y: f32[B,2,4] = mul(%a, 0.5)')
    found = match("%a = reshape(%x) {shape = ($rows, $heads, 4)} %y = mul(%a, $factor)", source)
    assert found is not None
    assert found.holes == {"rows": "B", "heads": 2, "factor": 0.5}


def test_a_hole_used_twice_must_be_the_same() -> None:
    pattern = "%a = mul(%x, $c) %y = div(%a, $c)"
    assert match(pattern, graph("%a: f32[B,8] = mul(%x, 2.0) %y: f32[B,8] = div(%a, 2.0)")) is not None
    assert match(pattern, graph("%a: f32[B,8] = mul(%x, 2.0) %y: f32[B,8] = div(%a, 3.0)")) is None


def test_a_value_used_twice_must_be_the_same() -> None:
    assert match("%y = mul(%x, %x)", graph("%y: f32[B,8] = mul(%x, %x)")) is not None
    assert match("%y = mul(%x, %x)", graph("%y: f32[B,8] = mul(%x, %z)")) is None


def test_a_typed_result_binds_dims() -> None:
    found = match("%y: any[N,M] = exp(%x)", graph("%y: f32[B,8] = exp(%x)"))
    assert found is not None
    assert found.holes == {"N": "B", "M": 8}
    assert match("%y: f16[N,M] = exp(%x)", graph("%y: f32[B,8] = exp(%x)")) is None
    assert match("%y: f32[N,N] = exp(%x)", graph("%y: f32[B,8] = exp(%x)")) is None


def test_an_option_that_the_pattern_does_not_name_must_be_off() -> None:
    source = '%w: f32[8,8] = weight() {name = "w"} %y: f32[B,8] = matmul(%x, %w)'
    assert match("%y = matmul(%x, %w)", graph(source)) is not None
    assert match("%y = matmul(%x, %w)", graph(source + " {transpose_b = true}")) is None


def test_comparisons_match_mirrored() -> None:
    source = graph('%c: bool[B,8] = compare(%x, 0.0) {kind = "gt"} %y: f32[B,8] = where(%c, %x, %z)')
    assert match('%c = compare(0.0, %p) {kind = "lt"} %y = where(%c, %p, %q)', source) is not None
    assert match('%c = compare(0.0, %p) {kind = "gt"} %y = where(%c, %p, %q)', source) is None


def test_an_intermediate_value_used_elsewhere_is_a_refusal_with_the_user() -> None:
    rule = Rule("sigmoid", SIGMOID.before, SIGMOID.after)
    done, log = apply(rule, graph(_SIGMOID + "%out: f32[B,8] = add(%y, %e)", "out"))
    assert len(done.equations) == 5
    assert [str(refusal) for refusal in log.refusals] == ["sigmoid, %y: %e is used elsewhere, by `add` (%out)"]


def test_an_intermediate_value_that_is_an_output_is_a_refusal() -> None:
    _, log = apply(Rule("exp", "%e = exp(%x) %y = tanh(%e)", "%y = tanh(%x)"),
                   graph("%e: f32[B,8] = exp(%x) %y: f32[B,8] = tanh(%e)", "e"))  # fmt: skip
    assert not log.hits
    assert "the block's results" in log.refusals[0].reason


def test_refuse_gives_its_reason_and_may_bind() -> None:
    def refuse(found: Match) -> str | None:
        factor = found.holes["factor"]
        assert isinstance(factor, float)
        found.holes["inverse"] = 1 / factor
        return "a factor of zero" if factor > 4 else None

    rule = Rule("divide", "%y = mul(%x, $factor)", "%y = div(%x, $inverse)", refuse=refuse)
    done, _ = apply(rule, graph("%y: f32[B,8] = mul(%x, 4.0)"))
    assert done.equations[0].args[1] == 0.25
    _, log = apply(rule, graph("%y: f32[B,8] = mul(%x, 8.0)"))
    assert log.refusals[0].reason == "a factor of zero"


def test_a_right_side_of_another_type_is_a_refusal() -> None:
    rule = Rule("wrong", "%y = exp(%x)", "%y = mean(%x)")
    done, log = apply(rule, graph("%y: f32[B,8] = exp(%x)"))
    assert done.equations[0].op == "exp"
    assert log.refusals[0].reason == "%y would change from f32[B,8] to f32[B,1]"


def test_what_repeat_captures_is_found_outside_and_stays_there() -> None:
    source = graph(
        "%n: f32[B,8] = sub(0.0, %x) %e: f32[B,8] = exp(%n)"
        "%out: f32[B,8] = repeat(%z) {count = 3} (%p: f32[B,8]) => { %d: f32[B,8] = add(%e, 1.0)"
        "  %y: f32[B,8] = div(1.0, %d) %q: f32[B,8] = add(%p, %y) yield %q }",
        "out",
    )
    done, log = apply(SIGMOID, source)
    assert [equation.op for equation in walk(done.equations)] == ["repeat", "sigmoid", "add"]  # the rest is dead now
    assert len(log.hits) == 1


def test_every_place_is_rewritten_and_new_names_are_unique() -> None:
    twice = Rule("halves", "%y = mul(%x, 2.0)", "%half = mul(%x, 1.0) %y = add(%half, %half)")
    done, log = apply(twice, graph("%a: f32[B,8] = mul(%x, 2.0) %y: f32[B,8] = mul(%a, 2.0)"))
    assert len(log.hits) == 2
    assert [equation.result.name for equation in done.equations] == ["a.half", "a", "y.half", "y"]


def test_several_roots_are_placed_before_their_first_user() -> None:
    rule = Rule(
        "join",
        before="%a = matmul(%x, %v) {transpose_b = true} %b = matmul(%x, %w) {transpose_b = true}",
        after="%c = concat(%v, %w) {axis = -2} %m = matmul(%x, %c) {transpose_b = true}"
        "%a = slice(%m) {axis = -1, start = 0, stop = 8} %b = slice(%m) {axis = -1, start = 8, stop = 16}",
    )
    source = graph(
        '%v: f32[8,8] = weight() {name = "v"} %a: f32[B,8] = matmul(%x, %v) {transpose_b = true}'
        '%t: f32[B,8] = tanh(%a) %w: f32[8,8] = weight() {name = "w"}'
        "%b: f32[B,8] = matmul(%x, %w) {transpose_b = true} %y: f32[B,8] = mul(%t, %b)"
    )
    done, _ = apply(rule, source)
    assert [equation.op for equation in done.equations] == [
        "weight", "weight", "concat", "matmul", "slice", "slice", "tanh", "mul",
    ]  # fmt: skip


def test_a_rule_with_a_spelling_mistake_says_where() -> None:
    with pytest.raises(SpecRTError, match="IR-001"):
        read_pattern("%y = exp(%x")
