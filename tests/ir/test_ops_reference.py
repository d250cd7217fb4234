"""docs/ops.md is what the registry says."""

from __future__ import annotations

from compiler.ir.ops import REGISTRY
from compiler.ir.ops_reference import PAGE, render


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run `python -m compiler.ir.ops_reference`"


def test_the_page_has_every_operation() -> None:
    assert all(f"### `{name}`\n" in render() for name in REGISTRY)
