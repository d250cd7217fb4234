"""Both generations and sizes, which share a model_type: the vendor's cases, and which head a config.json gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specs.config import resolve_config
from specs.errors import Where
from specs.match import match_spec
from tests.families.harness import REFERENCE, check_case, check_fuses, check_golden_ir

CASES = ["baichuan-7b", "baichuan-13b", "baichuan2-7b", "baichuan2-13b"]


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_vendor(case: str, tmp_path: Path) -> None:
    check_case(case, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("case", "changes", "expected"),
    [
        ("baichuan-7b", {"vocab_size": 64000}, False),
        ("baichuan-7b", {"vocab_size": 64003}, False),
        ("baichuan2-7b", {"vocab_size": 125696}, True),
        ("baichuan2-7b", {"vocab_size": 125700, "z_loss_weight": 0}, True),
        ("baichuan-13b", {"vocab_size": 64000}, False),
        ("baichuan-13b", {"vocab_size": 64003}, False),
        ("baichuan2-13b", {"vocab_size": 125696}, True),
        ("baichuan2-13b", {"vocab_size": 64000, "z_loss_weight": 0}, True),
    ],
)
def test_the_generation_is_told_from_config_json(case: str, changes: dict[str, int], expected: bool) -> None:
    config = {**json.loads((REFERENCE / case / "config.json").read_text()), **changes}
    spec = match_spec(config)
    assert spec.name == f"baichuan_{case.split('-')[1]}"
    assert resolve_config(spec, config, Where("config.json"))["unit_head"] is expected


def test_golden() -> None:
    for size in ("7b", "13b"):
        check_golden_ir(f"baichuan_{size}", f"baichuan_{size}", f"2-{size}")
        check_fuses(f"baichuan_{size}", size, norms=3, attentions=1, gated=1)
