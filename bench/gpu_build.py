"""How long engines take to build, for bench/gpu.py: from nothing, with the timing cache alone, with the plans kept."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any


def build(bundle: Path, out: Path) -> None:
    """Build three times, each time a copy of the bundle without engines; OUT is written after each."""
    from compiler.benchmark import about, built
    from runtime.bundle import Bundle

    opened = Bundle.open(bundle, verify=False)
    result: dict[str, Any] = about(opened) | {"steps": len(opened.program.steps)}
    before = os.environ.get("SPECRT_CACHE")
    with tempfile.TemporaryDirectory(prefix="specrt-build-") as folder:
        cache = Path(folder) / "cache"
        os.environ["SPECRT_CACHE"] = str(cache)
        for number, name in enumerate(("from nothing", "timing cache", "plans kept")):
            if name == "timing cache":
                shutil.rmtree(cache / "plans")
            here = Path(folder) / str(number)
            shutil.copytree(bundle / "segments", here / "segments")
            shutil.copy(bundle / "plan.json", here)
            result[name] = built(here)
            out.write_text(json.dumps(result, indent=1))
            print(name, result[name], flush=True)
    if before is None:
        del os.environ["SPECRT_CACHE"]
    else:
        os.environ["SPECRT_CACHE"] = before
