"""Write the table of models in README.md, from the specs and from what the family tests measured.

python tools/model_table.py           write the table
python tools/model_table.py --check   exit 1 if the table is out of date

A row needs evidence: docs/evidence/families.json, written by `UPDATE_EVIDENCE=1 pytest tests/families`, must have a
result of a test that still exists. So a spec that was just added makes no table stale; a change of one with a row may.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from compiler.cli.console import count_text, plural  # noqa: E402
from specs.match import spec_files  # noqa: E402
from specs.schema import Spec, load_spec  # noqa: E402
from specs.summary import summary  # noqa: E402

README = ROOT / "README.md"
EVIDENCE = ROOT / "docs" / "evidence" / "families.json"
TESTS = ROOT / "tests" / "families"
BEGIN = "<!-- models: written by `python tools/model_table.py`, do not edit -->\n"
END = "<!-- end of models -->\n"
HEAD = "| spec | published sizes | attention | positions | norms | MLP | tests | greatest error | equal ids |\n"
Cases = dict[str, dict[str, Any]]


def evidence() -> dict[str, Cases]:
    """By spec, the results of tests that still exist."""
    recorded: dict[str, Cases] = json.loads(EVIDENCE.read_text(encoding="utf-8")) if EVIDENCE.is_file() else {}
    tests = {
        f"{path.name}::{node.name}"
        for path in TESTS.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    kept = {spec: {test: case for test, case in cases.items() if test.split("[")[0] in tests}
            for spec, cases in recorded.items()}  # fmt: skip
    return {spec: cases for spec, cases in kept.items() if cases}


def unmeasured() -> list[str]:
    """The specs that have no row."""
    return [path.stem for path in spec_files() if path.stem not in evidence()]


def render() -> str:
    """The lines between the markers."""
    found = evidence()
    rows = [_row(path.stem, load_spec(path), found[path.stem]) for path in spec_files() if path.stem in found]
    if not rows:
        return "\nNothing is recorded yet.\n\n"
    cases = [case for cases in found.values() for case in cases.values()]
    dates = sorted({case["date"] for case in cases})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    versions = "; ".join(sorted({case["with"] for case in cases}))
    note = (
        f"{plural(len(rows), 'spec')}, {plural(len(cases), 'case')}, recorded {when} with {versions}. The error is "
        "the greatest absolute one of float32 logits (of an encoder: of every output) against "
        "the reference (transformers, or the vendor's code), over "
        "ragged batches of small random models of each variant; the ids are greedy, with the KV cache. "
        "`UPDATE_EVIDENCE=1 pytest tests/families` records, `python tools/model_table.py` writes this table.\n"
    )
    return f"\n{HEAD}|{'---|' * HEAD.count(' | ')}---|\n{''.join(rows)}\n{note}\n"


def _row(name: str, spec: Spec, cases: Cases) -> str:
    said = summary(spec)
    sizes = ", ".join(f"{size} {count_text(entry.parameters)}" for size, entry in _published(spec))
    files = sorted({test.split("::")[0] for test in cases})
    tests = ", ".join(f"[{file}](tests/families/{file})" for file in files) + f": {plural(len(cases), 'case')}"
    ids = sum(case["ids"] for case in cases.values())
    cells = (
        f"[{name}](specs/models/{name}.yaml)", sizes, said.attention, said.positions, said.norms, said.mlp, tests,
        f"{max(case['error'] for case in cases.values()):.1e}", f"{ids:,}" if ids else "no decoder",
    )  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _published(spec: Spec) -> Iterator[tuple[str, Any]]:
    """All sizes but the small ones that are ours."""
    return ((name, entry) for name, entry in spec.sizes.items() if name not in ("tiny", "demo"))


def page() -> str:
    """README.md with the table of today."""
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + render() + END + after


def main() -> int:
    """Write the table, or with --check only compare it."""
    if sys.argv[1:] == ["--check"]:
        if README.read_text(encoding="utf-8") == page():
            return 0
        print("the table in README.md is out of date: run `python tools/model_table.py`")
        return 1
    README.write_text(page(), encoding="utf-8")
    for name in unmeasured():
        print(f"no row for `{name}`: no result in {EVIDENCE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
