"""What the family tests measured, kept for the README's table: with UPDATE_EVIDENCE=1 they write it to
docs/evidence/families.json.

{spec: {test: {error, ids, date, with}}}: the greatest logit error, the greedy ids that were compared (all equal, else
the test had failed), the day, and the versions of what computed both sides.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "families.json"
_begun: set[tuple[str, str]] = set()  # (spec, test) of this run: its first record replaces that of an earlier run


def record(bundle: Path, error: float, ids: int) -> None:
    """Note one comparison of the running test (a test may make several: errors are maximised, ids added)."""
    if not os.environ.get("UPDATE_EVIDENCE"):
        return
    spec = Path(json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["source"]["spec"]).stem
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0].removeprefix("tests/families/")
    FILE.parent.mkdir(parents=True, exist_ok=True)
    with FILE.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # tests run in several processes
        file.seek(0)
        content: dict[str, dict[str, dict[str, Any]]] = json.loads(file.read() or "{}")
        before = content.get(spec, {}).get(test) if (spec, test) in _begun else None
        _begun.add((spec, test))
        content.setdefault(spec, {})[test] = {
            "error": max(float(f"{error:.1e}"), before["error"] if before else 0.0),
            "ids": ids + (before["ids"] if before else 0),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "with": ", ".join(f"{name} {version(name)}" for name in ("openvino", "torch", "transformers")),
        }
        file.truncate(0)
        file.write(_text(content))


def _text(content: dict[str, dict[str, dict[str, Any]]]) -> str:
    """JSON with a line for each test."""
    specs = (
        f" {json.dumps(spec)}: {{\n"
        + ",\n".join(f"  {json.dumps(test)}: {json.dumps(case)}" for test, case in sorted(cases.items()))
        + "\n }"
        for spec, cases in sorted(content.items())
    )
    return "{\n" + ",\n".join(specs) + "\n}\n"
