"""Mistakes in the text of a graph: what is said and where it points."""

from __future__ import annotations

import pytest

from compiler.ir.parser import Hole, parse, parse_pattern
from tests.golden_errors import check_raises

_BAD = {
    "character": "graph g(%x: f32[2]) {\n  %y: f32[2] = exp(%x) ~\n  return y = %y\n}",
    "undefined": "graph g(%x: f32[2]) {\n  %y: f32[2] = exp(%z)\n  return y = %y\n}",
    "twice": "graph g(%x: f32[2]) {\n  %x: f32[2] = exp(%x)\n  return y = %x\n}",
    "type": "graph g(%x: f33[2]) {\n  return y = %x\n}",
    "no-type": "graph g(%x: f32[2]) {\n  %y = exp(%x)\n  return y = %y\n}",
    "dim": "graph g(%x: f32[1.5]) {\n  return y = %x\n}",
    "range": "graph g(%x: f32[B]) {\n  dim B in one..2..3\n  return y = %x\n}",
    "literal": "graph g(%x: f32[2]) {\n  %y: f32[2] = gelu(%x) {approximate = yes}\n  return y = %y\n}",
    "hole": "graph g(%x: f32[2]) {\n  %y: f32[2] = mul(%x, $factor)\n  return y = %y\n}",
    "unfinished": "graph g(%x: f32[2]) {\n  %y: f32[2] = exp(%x)\n",
    "after-the-end": "graph g(%x: f32[2]) {\n  return y = %x\n}\n%y: f32[2] = exp(%x)",
    "string": 'graph g() {\n  %w: f32[2] = weight() {name = "w}\n  return w = %w\n}',
}


@pytest.mark.parametrize("name", _BAD)
def test_malformed_text(name: str) -> None:
    check_raises(f"IR-001-{name}", parse, _BAD[name], "model.ir")


def test_patterns_leave_out_types_and_have_holes() -> None:
    first, second = parse_pattern("%a = mul(%x, $factor) %y: any[N,M] = reshape(%a) {shape = ($n, 4)}")
    assert first.args[1] == Hole("factor")
    assert second.attr["shape"] == (Hole("n"), 4)
    assert second.result.type.shape == ("N", "M")
    assert second.args == (first.result,)


def test_places_are_read_back() -> None:
    text = "graph g(%x: f32[2]) {\n  %y: f32[2] = exp(%x) @ a folder/model.yaml:3:14\n  return y = %y\n}\n"
    (equation,) = parse(text).equations
    assert str(equation.where) == "a folder/model.yaml:3:14"
    assert str(parse(text)) == text
