"""The capability table: one verdict for each operation and element type, and errors that name what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler.ir.ops import REGISTRY
from compiler.ir.parser import parse
from compiler.ir.types import DTYPES, FLOATS, INTEGERS
from compiler.lower import Decompose, Emit, Unsupported, lower
from compiler.lower.openvino.capabilities import TABLE
from compiler.lower.openvino.reference import PAGE, render
from tests.golden_errors import check_raises

# Operations whose verdict is keyed by a type that their signature does not start with.
_BY_RESULT = {"compare": "T", "and": "bool", "or": "bool", "where": "T", "gather": "T"}


def admissible(name: str) -> set[str]:
    """The element types that an operation's signature lets through, for the one that keys the table."""
    definition = REGISTRY[name]
    letter = _BY_RESULT.get(name)
    if letter is None:
        letter = definition.operands[0].dtype if definition.operands else "T"
    if letter in DTYPES:
        return {letter}
    return {"F": set(FLOATS), "I": set(INTEGERS), "T": set(DTYPES)}[letter[0]]


def test_every_operation_and_type_has_one_verdict() -> None:
    assert set(TABLE) == set(REGISTRY)
    for name, row in TABLE.items():
        assert set(row) == admissible(name), name


def test_verdicts_have_reasons() -> None:
    for name, row in TABLE.items():
        for dtype, verdict in row.items():
            match verdict:
                case Emit():
                    pass
                case Decompose(rule):
                    assert rule, (name, dtype)
                case Unsupported(reason):
                    assert reason, (name, dtype)


UNSUPPORTED = """graph model(%x: i32[B,4], %s: i8[4]) {
  dim B in 1..1..8
  %half: i32[B,4] = div(%x, 2) @ specs/models/model.yaml:12:7
  %t: i8[4] = add(%s, %s) @ specs/models/model.yaml:13:9
  return half = %half, twice = %t
}
"""


def test_unsupported_operations_are_named(tmp_path: Path) -> None:
    check_raises("LOWER-001", lower, parse(UNSUPPORTED), {}.__getitem__, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["tpu"])
def test_unknown_targets_are_refused(target: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no backend"):
        lower(parse(UNSUPPORTED), {}.__getitem__, tmp_path, target=target)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run `python -m compiler.lower.openvino.reference`"
