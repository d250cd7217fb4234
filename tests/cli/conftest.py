"""The command line in this process, and as a user starts it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "demo" / "tiny-llama"
SPEC = ROOT / "specs" / "models" / "llama.yaml"


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        content = json.loads(self.out)
        assert isinstance(content, dict)
        return content


Cli = Callable[..., Outcome]


def run_here(arguments: Sequence[object], stdin: str | None = None) -> Outcome:
    from compiler.cli.app import app

    result = CliRunner().invoke(app, [str(item) for item in arguments], input=stdin, prog_name="specrt")
    return Outcome(result.exit_code, result.stdout, result.stderr)


def start(arguments: Sequence[object], **options: Any) -> subprocess.Popen[str]:
    """`specrt ...` as a process of its own, which an interrupt reaches."""
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # so a shell's background jobs are started, and what they start
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-m", "compiler.cli", *(str(item) for item in arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`cli("inspect", path)` runs a command in this process, as from the root of the repository."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("SPECRT_DEBUG", raising=False)

    def run(*arguments: object, stdin: str | None = None) -> Outcome:
        return run_here(arguments, stdin)

    return run
