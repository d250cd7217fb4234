"""The report as one HTML file: its data, styles and code inside, nothing fetched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any


def page(content: Mapping[str, Any]) -> str:
    """The page of a report's content (see compiler.validate.report)."""
    folder = files("compiler.validate") / "page"
    text = (folder / "page.html").read_text(encoding="utf-8")
    # `<` can't end the element early when it is written as an escape of JSON
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "{{css}}": (folder / "page.css").read_text(encoding="utf-8"),
        "{{js}}": (folder / "page.js").read_text(encoding="utf-8"),
        "{{data}}": data,
        "{{title}}": escape(str(content["title"])),
    }
    for mark, part in parts.items():
        text = text.replace(mark, part)
    return text
