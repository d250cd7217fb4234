"""The expression language: what it computes, and that nothing outside the whitelist is ever run."""

from __future__ import annotations

import ast
import builtins
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specs.errors import SpecRTError, Where
from specs.expressions import Expr, parse_expr
from specs.functions import FUNCTIONS

HERE = Where("spec.yaml", 3, 5)
ENV: dict[str, Any] = {
    "a": 6,
    "b": 4,
    "x": 2.5,
    "yes": True,
    "no": False,
    "nothing": None,
    "kinds": ["full", "window"],
    "rope": {"theta": 5.0, "inner": {"n": 7}},
    "name": "gelu",
}


def value(text: str, **names: Any) -> Any:
    return parse_expr(text, HERE).value({**ENV, **names})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a + b * 2", 14),
        ("a / 3", 2),
        ("a / b", 1.5),
        ("a // b", 1),
        ("-a % b", 2),
        ("2 ** -1", 0.5),
        ("d | a", 6),
        ("nothing | b", 4),
        ("d | nothing | 1.5", 1.5),
        ("no | yes", False),
        ("rope.theta", 5.0),
        ("rope.inner.n | 1", 7),
        ("rope.none_such | 1", 1),
        ("rope.theta.x | 1", 1),
        ("1 if a > b else 0", 1),
        ("a if no else none", None),
        ("kinds[1]", "window"),
        ("kinds[a % 2] == 'full'", True),
        ("'full' in kinds", True),
        ("name not in ['relu']", True),
        ("not yes or a == 6", True),
        ("yes and no", False),
        ("1 < b <= 4", True),
        ("min(a, b) + max(a, b)", 10),
        ("floor(x) + ceil(x)", 5),
        ("sqrt(16)", 4.0),
        ("log(exp(1))", 1.0),
        ("int(a * 0.4)", 2),
        ("len(kinds)", 2),
        ("clip(9, 0, 5)", 5),
        ("where(yes, 1, 2)", 1),
        ("abs(-3)", 3),
        ("true", True),
        ("d_head | a / b * 2", 3.0),
        ("rope['theta']", 5.0),
        ("(a - b) ** 0.5", 2**0.5),
    ],
)
def test_values(text: str, expected: object) -> None:
    result = value(text)
    assert result == expected
    assert type(result) is type(expected)


def test_vectors() -> None:
    numpy = pytest.importorskip("numpy")
    f = numpy.array([1.0, 0.1, 0.01], dtype=numpy.float32)
    result = value("where(2 * pi / f > 50, f / a, f)", f=f)
    assert result.dtype == numpy.float32
    assert result.tolist() == pytest.approx([1.0, 0.1 / 6, 0.01 / 6])
    assert value("clip(f, 0.05, 0.5)", f=f).tolist() == pytest.approx([0.5, 0.1, 0.05])


REFUSED = [
    "__import__('os')",
    "a.__class__",
    "().__class__",
    "[x for x in kinds]",
    "{1: 2}",
    "{1}",
    "lambda: 1",
    "f'{a}'",
    "a := 1",
    "open('x')",
    "kinds[0:1]",
    "a @ b",
    "a << b",
    "a & b",
    "~a",
    "+a",
    "a is b",
    "max(*kinds)",
    "max(a, b=1)",
    "kinds.append(1)",
    "(a).b",
    "b'x'",
    "1j",
    "...",
    "await a",
    "yield",
    "a; b",
    "a = 1",
    "import os",
    "max",
    "sqrt(a)(b)",
    "'%s' % a",
    "True",
    "None",
    "x" * 601,
    "(" * 300 + ")" * 300,
    "-" * 200 + "a",
    "",
    " ",
    "a b",
]


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(text: str) -> None:
    with pytest.raises(SpecRTError):
        value(text)


@pytest.mark.parametrize(
    "text",
    [
        "9 ** 9 ** 9",
        "2 ** 5000",
        "(0 - 1) ** 0.5",
        "1 / 0",
        "a + 'x'",
        "yes + 1",
        "'x' * 9",
        "kinds[5]",
        "kinds['a']",
        "rope['y']",
        "1 if a else 2",
        "a and yes",
        "'a' < 1",
        "-name",
        "sqrt(name)",
        "log(0)",
        "undefined + 1",
        "kinds * 2",
        "10.0 ** 400",
    ],
)
def test_what_cannot_be_computed(text: str) -> None:
    with pytest.raises(SpecRTError):
        value(text)


def test_types() -> None:
    assert parse_expr("8.0", HERE).as_int({}) == 8
    assert parse_expr(3, HERE).as_float({}) == 3.0
    assert parse_expr("a > 1", HERE).as_bool(ENV) is True
    assert parse_expr("name", HERE).as_str(ENV) == "gelu"
    for text, read in (
        ("x", Expr.as_int),
        ("yes", Expr.as_int),
        ("yes", Expr.as_float),
        ("a", Expr.as_bool),
        ("a", Expr.as_str),
    ):
        with pytest.raises(SpecRTError) as caught:
            read(parse_expr(text, HERE), ENV)
        assert caught.value.code == "SPEC-013"


def test_names() -> None:
    assert parse_expr("a.b | c + sqrt(d) if none else 'e'", HERE).names() == {"a.b", "c", "d"}


# ---- properties --------------------------------------------------------------------------------------------

pieces = st.sampled_from(
    [
        "a",
        "b",
        "x",
        "kinds",
        "rope",
        "name",
        "1",
        "2.5",
        "'t'",
        "+",
        "-",
        "*",
        "/",
        "**",
        "(",
        ")",
        "[",
        "]",
        ",",
        ".",
        ":",
        "|",
        "=",
        "==",
        "<",
        "if",
        "else",
        "for",
        "in",
        "not",
        "and",
        "lambda",
        "__class__",
        "__import__",
        "eval",
        "open",
        "max",
        "sqrt",
        "import",
        "yield",
        "{",
        "}",
        "@",
        "\n",
        "\\",
        "#",
        "f'{a}'",
        "_",
    ]
)


@settings(deadline=None, max_examples=400)
@given(st.one_of(st.lists(pieces, max_size=12).map(" ".join), st.text(max_size=40)))
def test_any_text_gives_a_value_or_our_error(text: str) -> None:
    try:
        result = value(text)
    except SpecRTError:
        return
    assert result is None or isinstance(result, int | float | str | list | dict)


ALLOWED = (
    ast.Expression,
    ast.Constant,
    ast.Name,
    ast.Attribute,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.IfExp,
    ast.List,
    ast.Tuple,
    ast.Subscript,
    ast.Call,
    ast.expr_context,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
)

python = st.recursive(
    st.sampled_from(["a", "b", "x", "kinds", "1", "'t'", "rope.theta", "true"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "*", "|", "==", "and", "in", "@", "if a else"]), inner).map(" ".join),
        inner.map("({})".format),
        inner.map("[{}]".format),
        inner.map("[{} for i in kinds]".format),
        inner.map("{}.__class__".format),
        inner.map("print({})".format),
        inner.map("sqrt({})".format),
        inner.map("(lambda: {})()".format),
        inner.map("{{{}}}".format),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(python)
def test_nothing_outside_the_whitelist_is_accepted(text: str) -> None:
    """Whatever parses as Python is either accepted with whitelisted nodes only, or refused before anything runs."""
    called: list[str] = []
    original = builtins.print
    builtins.print = lambda *_args, **_: called.append("print")
    try:
        expr = parse_expr(text, HERE)
        expr.value(ENV)
    except SpecRTError:
        return
    finally:
        builtins.print = original
        assert not called
    for node in ast.walk(expr.tree):
        assert isinstance(node, ALLOWED)
        if isinstance(node, ast.Call):
            assert isinstance(node.func, ast.Name)
            assert node.func.id in FUNCTIONS
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("__")
