"""The report as one HTML file: its data, styles and code inside, nothing fetched."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any


def page(content: Mapping[str, Any]) -> str:
    """The page of a report's content (see compiler.validate.report)."""
    folder = files("compiler.validate") / "page"
    text = (folder / "page.html").read_text(encoding="utf-8")
    # `<` can't end the element early when it is written as an escape of JSON
    packed = {**content, "cells": _packed(content["cells"])}
    data = json.dumps(packed, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "{{css}}": (folder / "page.css").read_text(encoding="utf-8"),
        "{{js}}": (folder / "page.js").read_text(encoding="utf-8"),
        "{{data}}": data,
        "{{title}}": escape(str(content["title"])),
    }
    for mark, part in parts.items():
        text = text.replace(mark, part)
    return text


def _packed(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tens of thousands of cells say the same few things: rows of numbers of texts, and the texts once."""
    texts: dict[str, int] = {}
    keys = ("model", "precision", "gpu", "toolchain", "level", "code", "reason")
    rows = [
        [*(texts.setdefault(cell[key], len(texts)) for key in keys), cell["evidence"], int(cell["stale"])]
        for cell in cells
    ]
    return {"keys": keys, "texts": list(texts), "rows": rows}
