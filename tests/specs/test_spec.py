"""Reading specs: values and positions of YAML, equations, parts, what stands in the shipped files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from specs import reference
from specs.checks import layered_parts
from specs.equations import BinOp, Call, Constant, IfExp, Name, Repeat, walk
from specs.errors import SpecRTError, Where
from specs.expressions import parse_expr
from specs.layouts import parse_layout
from specs.parts import Attention
from specs.positions import Rope
from specs.rope import inv_freq, rope_formulas
from specs.schema import load_spec
from specs.yaml_loader import YamlList, YamlMap, load_yaml, plain
from tests.golden_errors import ROOT, check_raises
from tests.specs.samples import broken, write_spec

MODELS = sorted((ROOT / "specs" / "models").glob("*.yaml"))


# ---- YAML --------------------------------------------------------------------------------------------------


def test_plain_values_and_places() -> None:
    node = load_yaml(
        "x.yaml", "a: [1, -2.5, 1_000, true, null, ~, text of words, \"yes\", '1e-5', 1.0e-5]\nb:\n  c: d\n"
    )
    assert plain(node) == {
        "a": [1, -2.5, 1000, True, None, None, "text of words", "yes", "1e-5", 1e-5],
        "b": {"c": "d"},
    }
    inner = node["b"]
    assert isinstance(inner, YamlMap)
    assert inner.key_where["c"] == Where("x.yaml", 3, 3)
    items = node["a"]
    assert isinstance(items, YamlList)
    assert items[1].where == Where("x.yaml", 1, 8)


scalars = st.one_of(
    st.text(alphabet="0123456789.eE+-_:xobn~yY", max_size=8),
    st.sampled_from(
        [
            "yes",
            "No",
            "ON",
            "off",
            "y",
            "TRUE",
            "Null",
            "0x1F",
            "0o17",
            "1e5",
            ".5",
            "5.",
            "+1",
            "1_0",
            "1:30:00",
            ".inf",
        ]
    ),
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
)


@settings(deadline=None)
@given(scalars)
def test_a_bare_scalar_means_what_it_looks_like_or_is_refused(text: str) -> None:
    """What is accepted as a number is Python's reading of it, and never text that looks like a number."""
    try:
        value = plain(load_yaml("x.yaml", f"key: {text}\n"))
    except SpecRTError as caught:
        code = caught.code
    else:
        code = ""
    assert code in {"", "SPEC-001", "SPEC-003"}
    if code:
        return
    assert isinstance(value, dict)
    read = next(iter(value.values()))
    if isinstance(read, int | float) and not isinstance(read, bool):
        assert read == float(text.replace("_", "")) or read == int(text.replace("_", ""))
    elif isinstance(read, str):
        with pytest.raises(ValueError, match="could not convert"):
            float(read)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_yaml_or_our_error(text: str) -> None:
    where: Where | None = Where("x.yaml")
    try:
        load_yaml("x.yaml", text)
    except SpecRTError as caught:
        where = caught.where
    assert where is not None
    assert where.file == "x.yaml"


def test_our_reading_agrees_with_pyyaml_on_the_shipped_files() -> None:
    for path in [*MODELS, *(ROOT / "specs").glob("*.yaml")]:
        assert plain(load_yaml(path)) == yaml.safe_load(path.read_text()), path


# ---- wiring ------------------------------------------------------------------------------------------------


def test_equations(tmp_path: Path) -> None:
    spec = broken(
        tmp_path, "x + attn(h) + mlp(h)", "x * sqrt(d_model) - (attn(h) if layer % 2 == 0 else mlp(h)) / (layer + 1)"
    )
    repeat = spec.graph[1]
    assert isinstance(repeat, Repeat)
    assert repeat.count.as_int({"layers": 3}) == 3
    value = repeat.body[1].value
    assert isinstance(value, BinOp)
    assert value.op == "-"
    left, right = value.left, value.right
    assert isinstance(left, BinOp)
    assert isinstance(left.right, Constant)
    assert left.right.expr.as_float({"d_model": 16}) == 4.0
    assert isinstance(right, BinOp)
    assert isinstance(right.left, IfExp)
    assert [right.left.test.as_bool({"layer": layer}) for layer in range(2)] == [True, False]
    assert isinstance(right.left.body, Call)
    assert [type(node) for node in walk(right.left.body)] == [Call, Name]
    assert layered_parts(spec) == {"norm_1", "attn", "mlp"}


def test_places_in_quoted_and_bare_equations(tmp_path: Path) -> None:
    spec = broken(tmp_path, "- x = embed(tokens)", '- "x = embed(tokens)"')
    assert spec.graph[0].value.where.column == 10  # type: ignore[union-attr]


def test_a_part_may_stand_on_both_sides_of_a_condition(tmp_path: Path) -> None:
    both = "x = x + attn(h) + mlp(h) if tied else x + mlp(attn(h))"
    broken(tmp_path, "x = x + attn(h) + mlp(h)", both)
    twice = both.replace("else x", "else mlp(x)")
    check_raises("SPEC-018-used-twice-on-one-side", broken, tmp_path, "x = x + attn(h) + mlp(h)", twice)


def test_negation_is_a_product(tmp_path: Path) -> None:
    spec = broken(tmp_path, "- x = embed(tokens)", "- x = -embed(tokens)")
    value = spec.graph[0].value  # type: ignore[union-attr]
    assert isinstance(value, BinOp)
    assert (value.op, isinstance(value.right, Call)) == ("*", True)


# ---- parts -------------------------------------------------------------------------------------------------


def test_dimensions_come_from_config_unless_written(tmp_path: Path) -> None:
    attn: Any = broken(tmp_path, "    mask: causal\n", "    mask: causal\n    kv_heads: 1\n").parts["attn"]
    assert isinstance(attn, Attention)
    assert (attn.heads.text, attn.kv_heads.text, attn.d_head.text) == ("heads", "1", "d_head")
    assert attn.window is None
    assert isinstance(attn.position, Rope)
    assert attn.choice("mask", {}) == "causal"


def test_specs_are_frozen(tmp_path: Path) -> None:
    spec = load_spec(write_spec(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"
    assert spec.key_where("parts", "attn").line == 20


def test_layout_axes_may_be_expressions() -> None:
    layout = parse_layout("(heads * 2) [gate, up: 2] d_ffn/2 2", Where("x"))
    assert layout.sizes({"heads": 3, "d_ffn": 8}) == (6, {"gate": (0, 1), "up": (1, 3)}, 3, 8)


# ---- shipped files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_shipped_models_load_and_are_short(path: Path) -> None:
    spec = load_spec(path)
    assert spec.name == path.stem
    text = path.read_text()
    assert len(text.splitlines()) < 60 or "# more than 60 lines: " in text  # and then the reason


def test_every_rope_formula_runs() -> None:
    parameters: dict[str, Any] = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    for name, formula in rope_formulas().items():
        scaling = {"rope_type": name, **{key: value for key, value in parameters.items() if key in formula.needs}}
        found = inv_freq(16, 10000.0, scaling, context=64)
        frequencies, multiplier = found.short, found.multiplier
        assert frequencies.dtype == "float32"
        assert frequencies.shape == (8,)
        assert multiplier > 0


def test_the_reference_is_current() -> None:
    assert reference.PATH.read_text(encoding="utf-8") == reference.render(), "run `python -m specs.reference`"


def test_importing_the_package_is_light() -> None:
    code = "import sys, specs, specs.schema, specs.config, specs.match; print(*{'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_literal_keeps_its_value() -> None:
    assert [parse_expr(value, Where("x")).value({}) for value in (3, 2.5, True, None)] == [3, 2.5, True, None]
