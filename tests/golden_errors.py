"""Golden error texts: `check_golden("SPEC-002-duplicate-key", error)`; UPDATE_GOLDENS=1 rewrites the files."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specs.errors import SpecRTError

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "golden" / "errors"
_TEMPORARY = re.compile(re.escape(tempfile.gettempdir()) + r"/pytest-of-[^/]+/pytest-\d+/(?:popen-gw\d+/)?[^/\s:`]+")


def normalize(text: str) -> str:
    """Without what differs by machine or moves: pytest's temporary folders become <tmp>, the repository is left out,
    and a place in a shipped spec keeps its file only.
    """
    text = _TEMPORARY.sub("<tmp>", text).replace(f"{ROOT}/", "")
    return re.sub(r"(specs/(?:models|precisions)/\w+\.yaml):\d+:\d+", r"\1:LINE:COLUMN", text).rstrip() + "\n"


def check_golden(name: str, error: SpecRTError | str) -> None:
    """Compare an error's text with tests/golden/errors/NAME.txt; NAME is the code, then `-variant`."""
    text = normalize(str(error))
    code = re.match(r"error\[([A-Z]+-\d+)\]", text)
    assert code is not None, text
    assert re.fullmatch(rf"{code[1]}(-[a-z0-9-]+)?", name), f"golden {name}, but the error is\n{text}"
    path = GOLDENS / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDENS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    assert path.is_file(), f"no {path.relative_to(ROOT)}; with UPDATE_GOLDENS=1 it would be\n{text}"
    assert text == path.read_text(encoding="utf-8")


def check_raises(name: str, action: Callable[..., Any], *args: Any, **kwargs: Any) -> SpecRTError:
    """Run `action`, which must fail with the golden error NAME; gives the error."""
    with pytest.raises(SpecRTError) as caught:
        action(*args, **kwargs)
    check_golden(name, caught.value)
    return caught.value
