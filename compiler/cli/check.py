"""What it takes for a bundle to load on this machine, step by step, up to the first that fails."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compiler.cli.console import bytes_text, plural
from specs.errors import SpecRTError


@dataclass
class Checks:
    """Each step that went well with what it found, and the error of the one that did not."""

    steps: list[tuple[str, str]] = field(default_factory=list)
    error: SpecRTError | None = None

    def as_dict(self) -> dict[str, Any]:
        """The content of `bundle` in `doctor --json`."""
        return {
            "loads": self.error is None,
            "steps": [{"name": name, "found": found} for name, found in self.steps],
            "error": None if self.error is None else self.error.as_dict(),
        }


def check_bundle(path: Path) -> Checks:
    """Read the bundle, load it and compute the logits of one token; a mistake ends the checks, it is not raised."""
    checks = Checks()
    try:
        _check(path, checks.steps)
    except SpecRTError as error:
        checks.error = error
    return checks


def _check(path: Path, steps: list[tuple[str, str]]) -> None:
    import runtime
    from runtime.bundle import Bundle

    bundle = Bundle.open(path)
    files = bundle.manifest["files"]
    total = sum(entry["size"] for entry in files.values())
    steps.append(("files", f"{plural(len(files), 'file')}, {bytes_text(total)}, as they were written"))
    steps.append(("made with", ", ".join(f"{name} {version}" for name, version in bundle.toolchain.items())))
    with runtime.load(path, verify=False) as model:  # the hashes were compared above
        steps.append(("loads", f"{plural(len(bundle.program.steps), 'engine')} compiled for this machine"))
        if bundle.role == "decoder":
            model.logits([[0]])
            steps.append(("runs", "logits of one token"))
