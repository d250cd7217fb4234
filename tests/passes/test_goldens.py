"""Every rule, fired and refused: the graph before and after, hits and reasons; and both graphs compute the same.

UPDATE_GOLDENS=1 rewrites tests/golden/passes/PASS/CASE.ir.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from compiler.ir import Graph
from compiler.ir.parser import parse
from compiler.passes import fuse_attention, fuse_gated_mlp, fuse_norm, fuse_qkv
from compiler.passes.runner import PassReport, run_passes
from specs.errors import Where
from tests.passes.cases import CASES
from tests.passes.graphs import Weights, drive, text_of

GOLDENS = Path(__file__).parents[1] / "golden" / "passes"
# Largest difference relative to the largest value. float32: rewriting changes the order of sums of fewer than 100
# terms, each rounded to 2^-24; the largest seen over all cases is 1e-6. 16 bits: every activation is rounded to 8
# (bfloat16) or 11 bits of mantissa, some 20 roundings deep.
TOLERANCE = {"f32": 1e-5, "bf16": 20 * 2**-9, "f16": 20 * 2**-12}


def describe(before: Graph, after: Graph, report: PassReport) -> str:
    """The golden text; comments are skipped by the parser."""
    lines = ["// before", text_of(before).rstrip()]
    lines += ["// unchanged"] if after == before else ["// after", text_of(after).rstrip()]
    lines += [f"// hit {hit.rule} at %{hit.at}" + place(hit.where) for hit in report.hits]
    lines += [f"// refused {no.rule} at %{no.at}{place(no.where)}: {no.reason}" for no in report.refusals]
    return "\n".join(lines) + "\n"


def place(where: Where | None) -> str:
    return "" if where is None else f" @ {Path(where.file).name}:{where.line}:{where.column}"


def dtype_of(name: str) -> str:
    return {"bf16": "bf16", "fp16": "f16"}.get(name.partition("/")[2].partition("_")[0], "f32")


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    item, case = CASES[name]
    before = case()
    after, (report,) = run_passes(before, (type(item)(item.name, item.apply),))
    text = describe(before, after, report)
    path = GOLDENS / f"{name}.ir"
    if os.environ.get("UPDATE_GOLDENS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"no {path}; with UPDATE_GOLDENS=1 it would be\n{text}"
    assert text == path.read_text(encoding="utf-8")
    assert parse(str(after)) == after

    refused = "/refused" in name
    assert (after == before) == (refused or name in ("fold_constants/kept", "assign_precision/fp32"))
    assert bool(report.refusals) == refused or name in EXPLAINED, report.refusals


# Fires, and also says why something else in the same graph did not.
EXPLAINED: frozenset[str] = frozenset()


@pytest.mark.parametrize("name", [name for name in CASES if "/refused" not in name])
def test_same_numbers(name: str) -> None:
    item, case = CASES[name]
    before = case()
    after, _ = run_passes(before, (type(item)(item.name, item.apply),))
    weights = Weights(before)
    want, got = drive(before, weights), drive(after, weights)
    assert want.keys() == got.keys()
    for output in want:
        wide = want[output].float()
        error = (got[output].float() - wide).abs().max() / wide.abs().max()
        assert error <= TOLERANCE[dtype_of(name)], f"{output}: {error:.1e}"
        assert torch.isfinite(got[output]).all()


def test_every_rule_has_a_golden_that_fires_and_one_that_is_refused() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in GOLDENS.glob("*/*.ir"))
    fired, refused = (set(re.findall(rf"^// {word} (\w+) at ", text, re.MULTILINE)) for word in ("hit", "refused"))
    rules = {rule.name for module in (fuse_norm, fuse_gated_mlp, fuse_qkv) for rule in module.RULES}
    rules |= {fuse_attention.ATTENTION.name, "paged_attention", "cached_attention", "pack_tokens", "select_rows"}
    assert rules <= fired
    assert rules <= refused
    assert {"constant", "literal", "identity", "chain", "equal", "dead", "bf16_weight", "bf16_state", "cast"} <= fired


def test_every_golden_has_its_case() -> None:
    files = {str(path.relative_to(GOLDENS).with_suffix("")) for path in GOLDENS.glob("*/*.ir")}
    assert files == set(CASES)
