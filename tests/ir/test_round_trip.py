"""Text and graph are the same thing: what is printed parses back, and mistakes in text are errors with a place."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from compiler.ir import Equation, Graph, TensorType, Value, walk
from compiler.ir.core import AttrValue
from compiler.ir.parser import parse
from compiler.ir.printer import print_graph, print_literal
from compiler.ir.verify import verify
from specs.errors import SpecRTError
from tests.ir.strategies import graphs, literals


@settings(max_examples=60)
@given(graphs())
def test_random_graphs_round_trip(graph: Graph) -> None:
    verify(graph)
    text = str(graph)
    again = parse(text)
    assert again == graph
    assert str(again) == text
    assert [equation.where for equation in walk(again.equations)] == [
        equation.where for equation in walk(graph.equations)
    ]
    assert parse(print_graph(graph, places=False)) == graph


def with_literal(value: AttrValue) -> Graph:
    """A graph with any literal at all as an attribute; the text knows no signatures."""
    result = Value("y", TensorType("f32"))
    equation = Equation("const", (), (result,), (("value", value), ("other", value)))
    return Graph("g", (), (), (equation,), (("y", result),))


@given(literals)
def test_attributes_of_every_kind_round_trip(value: AttrValue) -> None:
    graph = with_literal(value)
    again = parse(str(graph))
    assert again == graph
    # 1, 1.0 and true are equal in Python; text keeps them apart
    assert repr(again.equations[0].attrs) == repr(graph.equations[0].attrs)


@given(st.floats())
def test_floats_round_trip_bit_by_bit(value: float) -> None:
    (_, again), _ = parse(str(with_literal(value))).equations[0].attrs
    assert isinstance(again, float)
    assert math.isnan(again) == math.isnan(value)
    assert math.isnan(value) or (again == value and math.copysign(1, again) == math.copysign(1, value))


def test_literals_as_printed() -> None:
    shown = {
        print_literal(value)
        for value in (None, True, 1, 1.0, -0.0, 1e-05, float("inf"), float("nan"), 'a"\\\n', (1, (2.5, "x")), ())
    }
    assert shown == {
        "none",
        "true",
        "1",
        "1.0",
        "-0.0",
        "1e-05",
        "inf",
        "nan",
        '"a\\"\\\\\\n"',
        '(1, (2.5, "x"))',
        "()",
    }


def test_comments_and_layout_do_not_matter() -> None:
    text = "graph g(%x: f32[2]) { // the input\n  %y: f32[2] = exp(%x) // and more\n return y = %y }"
    assert str(parse(text)) == "graph g(%x: f32[2]) {\n  %y: f32[2] = exp(%x)\n  return y = %y\n}\n"


_SOURCE = str(
    parse(
        """graph g(%x: f32[B,8], %i: i32[B]) { dim B in 1..2..4
        %w: f32[8,8] = weight() {name = "w"} @ model.yaml:3:4
        %m: f32[B,8] = matmul(%x, %w) {transpose_b = true}
        %c: f32[2,1] = const() {value = ((1.0), (-2.5e-3))}
        %t: f32[8,B] = transpose(%m) {axes = (-1, -2)}
        %s: f32[B,4] = slice(%m) {axis = -1, start = 0, stop = 4}
        %j: f32[B,8] = concat(%s, %s) {axis = -1}
        %v: f32[B,2,4] = reshape(%j) {shape = ("B", 2, 4)}
        %g: f32[B,8] = gather(%w, %i)
        %r: f32[B,8] = repeat(%g) {count = 3} (%p: f32[B,8]) => {
          %a: f32[8] = weight() {name = "layers.{i}.a"}
          %n: f32[B,8] = layer_norm(%p, %a, _) {eps = 1e-05}
          %k: bool[B,8] = compare(%n, 0.5) {kind = "lt"}
          %q: f32[B,8] = where(%k, %n, -inf)
          yield %q
        }
        return y = %r, z = %v, t = %t, c = %c }"""
    )
)
_PIECES = [
    "%x", "%w", "%nothing", "(", ")", "{", "}", "_", "0", "-1", "1.5", "inf", '"w"', "true", "none", "B", "f32[B,8]",
    "=", "f32[", "..", ",", "repeat", "exp", "dim B in", "$hole", "@ here", "yield", "return", "i32", "()", "(-1, -1)",
]  # fmt: skip


@settings(max_examples=300)
@given(st.data())
def test_damaged_text_is_an_error_with_a_code_and_never_a_crash(data: st.DataObject) -> None:
    words = _SOURCE.split(" ")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(words) - 1))
        words[at : at + data.draw(st.integers(0, 2))] = data.draw(st.lists(st.sampled_from(_PIECES), max_size=2))
    try:
        verify(parse(" ".join(words)))
    except SpecRTError as error:
        if error.code not in ("IR-001", "IR-003"):
            raise


def test_the_source_of_the_damage_is_sound() -> None:
    verify(parse(_SOURCE))
    assert replace(parse(_SOURCE), name="g") == parse(_SOURCE)
