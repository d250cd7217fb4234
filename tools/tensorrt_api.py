"""Compacts the recorded Python API of a TensorRT version for the tests: methods with their parameters, enumerators.

python tools/tensorrt_api.py FOLDER      writes tests/data/tensorrt_api/VERSION.json for each VERSION*.json in FOLDER
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "tensorrt_api"
_SIGNATURE = re.compile(r"^(?:\d+\. )?\w+\((.*)\) -> (.+)$")
_OTHERS = (
    "ITensor", "Weights", "Builder", "INetworkDefinition", "IBuilderConfig", "IOptimizationProfile", "IAttention",
    "ITimingCache", "IHostMemory", "Logger", "ILogger", "ICudaEngine", "IExecutionContext",
)  # fmt: skip


def compact(api: dict[str, Any]) -> dict[str, Any]:
    """Classes of layers, building and running; a member is `=` (a property) or `[[parameters, result], ...]`; enums.

    A parameter with a default ends in `?`.
    """
    classes = {
        name: {member: _member(value) for member, value in members.items()}
        for name, members in sorted(api["classes"].items())
        if name in _OTHERS or (name.startswith("I") and name.endswith("Layer"))
    }
    return {"version": api["version"], "classes": classes, "enums": api["enums"]}


def _member(value: Any) -> Any:
    if not isinstance(value, list):
        return "="
    return [[_parameters(found[1]), found[2]] for text in value if (found := _SIGNATURE.match(text))]


def _parameters(text: str) -> list[str]:
    names = []
    for part in re.sub(r"\[[^\]]*\]|<[^>]*>", "", text).split(","):
        name, _, rest = part.strip().partition(":")
        if name and name != "self":
            names.append(name + ("?" if "=" in rest else ""))
    return names


def main() -> int:
    """Write the compact files."""
    OUT.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(sys.argv[1]).glob("*.json")):
        api = compact(json.loads(path.read_text(encoding="utf-8")))
        lines = [
            f" {json.dumps(name)}: {json.dumps(members, separators=(',', ':'))}"
            for name, members in api["classes"].items()
        ]
        text = ",\n".join(lines)
        enums = ",\n".join(f" {json.dumps(name)}: {json.dumps(names)}" for name, names in sorted(api["enums"].items()))
        version = ".".join(str(api["version"]).split(".")[:3])
        content = f'{{"version": "{api["version"]}", "classes": {{\n{text}}},\n"enums": {{\n{enums}}}}}\n'
        (OUT / f"{version}.json").write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
