"""Names of weights inside `repeat`."""

from __future__ import annotations

import pytest

from compiler.ir.names import expand, index_text, is_template


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("layers.{i}.q", ["layers.0.q", "layers.1.q", "layers.2.q"]),
        ("layers.{i+3}.q", ["layers.3.q", "layers.4.q", "layers.5.q"]),
        ("layers.{2*i}.q", ["layers.0.q", "layers.2.q", "layers.4.q"]),
        ("layers.{2*i+1}.q", ["layers.1.q", "layers.3.q", "layers.5.q"]),
        ("a.{i}.b.{i+1}", ["a.0.b.1", "a.1.b.2", "a.2.b.3"]),
        ("embed.weight", ["embed.weight"] * 3),
    ],
)
def test_expand(template: str, names: list[str]) -> None:
    assert [expand(template, index) for index in range(3)] == names
    assert is_template(template) == ("{" in template)


@pytest.mark.parametrize("stride", [1, 2, 5])
@pytest.mark.parametrize("start", [0, 1, 7])
def test_index_text_is_what_expand_reads(stride: int, start: int) -> None:
    text = index_text(stride, start)
    assert is_template(text)
    assert [expand(text, index) for index in range(4)] == [str(stride * index + start) for index in range(4)]
