"""Write the project's own report, docs/evidence/index.html and report.md: the seed matrix and the demo model.

    python tools/own_report.py        also: make report

The demo model is calibrated on the first half of its tokens and judged on others of the second half.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
(DEMO,) = (path.relative_to(ROOT) for path in (ROOT / "demo").iterdir())  # the one model that is here
OUT = Path("build") / "report"
GPUS = "sm70,sm75,sm80,sm86,sm89,sm90,sm100,sm120"


def main() -> int:
    """Run `specrt validate`, then keep its page and its text."""
    data = ROOT / "build" / "report-data"
    data.mkdir(parents=True, exist_ok=True)
    ids = np.load(ROOT / DEMO / "calibration-tokens.npy")
    half = len(ids) // 2
    np.save(data / "calibration.npy", ids[:half])
    np.save(data / "heldout.npy", ids[half : half + 2048])
    relative = data.relative_to(ROOT)
    command = [
        sys.executable, "-m", "compiler.cli", "validate", str(DEMO), "--matrix", "tensorrt-llm-0.5", "--gpus", GPUS,
        "--text", str(relative / "heldout.npy"), "--calibration", str(relative / "calibration.npy"),
        "--evidence", "docs/evidence", "--out", str(OUT),
    ]  # fmt: skip
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code == 0:
        for name in ("index.html", "report.md"):
            shutil.copyfile(ROOT / OUT / name, ROOT / "docs" / "evidence" / name)
    return code


if __name__ == "__main__":
    sys.exit(main())
