"""What every command owes: instant help, exit codes, mistakes without a traceback, JSON, cleaning up."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from compiler.cli import console
from specs.errors import SpecRTError, Where
from tests.cli.conftest import DEMO, ROOT, Cli, run_here
from tests.golden_errors import check_golden

COMMANDS = ("compile", "run", "inspect", "explain", "infer", "diff", "models", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_exit_codes(cli: Cli, command: str) -> None:
    done = cli(command, "--help")
    assert done.code == 0
    assert "Exit codes" in done.out
    assert "--json" in done.out


def test_help_is_instant() -> None:
    """Half a second is the promise; of the processor's time, because the machine is shared."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "from compiler.cli import compile_main; compile_main()"
    subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, compiler.cli.app\n"
        "try: compiler.cli.app.app(['compile', '--help'])\n"
        "except SystemExit: pass\n"
        "print('loaded', *sorted({'torch', 'openvino', 'numpy', 'networkx', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].split() == ["loaded"]


def test_version(cli: Cli) -> None:
    import specs

    assert cli("--version").out == f"specrt {specs.__version__}\n"


def test_wrong_usage_is_2(cli: Cli) -> None:
    assert cli("compile").code == 2
    assert cli("inspect", DEMO, "--bogus").code == 2
    assert cli("inspect", DEMO, "--max-batch", "0").code == 2
    assert cli("nothing").code == 2


def _command(error: BaseException) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @console.command
    def fail(json: bool = False, debug: bool = False) -> None:  # noqa: ARG001 (read by @command)
        raise error

    return app


def _run(error: BaseException, *arguments: str) -> tuple[int, str, str]:
    from typer.testing import CliRunner

    result = CliRunner().invoke(_command(error), list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_a_mistake_is_1_and_shown_as_it_is() -> None:
    error = SpecRTError("SPEC-001", "a [bold]long[/] message " * 20, where=Where("a.yaml", 3, 4), hint="`do` it")
    assert _run(error) == (1, "", str(error) + "\n")


def test_a_mistake_as_json() -> None:
    import json

    error = SpecRTError("SPEC-001", "wrong", where=Where("a.yaml", 3, 4), hint="do it", notes=("one",))
    code, out, err = _run(error, "--json")
    place = {"file": "a.yaml", "line": 3, "column": 4}
    wanted = {"code": "SPEC-001", "message": "wrong", "where": place, "notes": ["one"], "hint": "do it"}
    assert (code, json.loads(out), err) == (1, {"error": wanted}, "")


def test_a_bug_is_70_in_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECRT_DEBUG", raising=False)
    code, out, err = _run(ValueError("first\nsecond"))
    assert (code, out) == (70, "")
    assert err.splitlines()[0] == "internal error: ValueError: first"
    assert len(err.splitlines()) == 2
    assert "Traceback" not in err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECRT_DEBUG", raising=False)
    assert "Traceback" in _run(ValueError("x"), "--debug")[2]
    monkeypatch.setenv("SPECRT_DEBUG", "1")
    assert "Traceback" in _run(ValueError("x"))[2]
    monkeypatch.setenv("SPECRT_DEBUG", "0")
    assert "Traceback" not in _run(ValueError("x"))[2]


def test_interrupted_is_130() -> None:
    code, _, err = _run(KeyboardInterrupt())
    assert code == 130
    assert "interrupted" in err


def test_terminated_is_143_and_cleans_up() -> None:
    code = (
        "import os, signal, sys; from compiler.cli.console import command\n"
        "@command\n"
        "def work():\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM); signal.pause()\n"
        "    finally: print('cleaned', flush=True)\n"
        "work()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "cleaned\n")


def test_a_reader_that_leaves_is_no_bug() -> None:
    done = subprocess.run(
        f"{sys.executable} -m compiler.cli inspect {DEMO} --ir | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode in (0, 141)


@pytest.mark.parametrize(
    ("golden", "arguments"),
    [
        ("CLI-010", ["compile", DEMO, "--target", "tpu"]),
        ("PREC-001-option", ["compile", DEMO, "--precision", "fp12"]),
        ("CLI-010-weights", ["compile", DEMO, "--weights", "none"]),
        ("CLI-014", ["inspect", DEMO, "--stage", "77"]),
    ],
)
def test_mistakes_in_options(cli: Cli, golden: str, arguments: list[object]) -> None:
    done = cli(*arguments)
    assert (done.code, done.out) == (1, "")
    check_golden(golden, done.err)


def test_api_limits() -> None:
    import compiler

    with pytest.raises(SpecRTError) as caught:
        compiler.prepare(DEMO, max_batch=0)
    check_golden("CLI-011", caught.value)


def test_a_file_that_can_not_be_written(cli: Cli) -> None:
    done = cli("inspect", DEMO, "--svg", "/dev/null/picture.svg")
    assert done.code == 1
    check_golden("CLI-012", done.err)


DOCUMENTED: tuple[tuple[str, list[object]], ...] = (
    ("inspect", [DEMO, "--ir", "--mermaid", "--plan"]),
    ("explain", [DEMO]),
    ("infer", [DEMO]),
    ("diff", [DEMO, "specs/models/llama.yaml:7b"]),
    ("models", []),
    ("doctor", []),
)


def test_every_documented_json_key_is_there_and_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for command, arguments in DOCUMENTED:
        section = re.search(rf"^\*\*{command}\*\*\n(.*?)(?=^\*\*|\Z)", text, re.M | re.S)
        assert section is not None
        rows = [line for line in section[1].splitlines() if line.startswith("| `")]
        keys = {key for line in rows for key in re.findall(r"`(\w+)`", line.split("|")[1])}
        optional = {"svg", "bundle"} if command in ("inspect", "doctor") else set()
        assert set(run_here([command, *arguments, "--json"]).json) == keys - optional, command


def test_number_formats() -> None:
    assert [console.bytes_text(size) for size in (0, 834, 22_400_000, 999_600, 5e12)] == [
        "0 B", "834 B", "22.4 MB", "1.0 MB", "5.0 TB",
    ]  # fmt: skip
    assert [console.count_text(size) for size in (12, 5_475_584, 6_738_415_616)] == ["12", "5.48M", "6.74B"]
    assert console.plural(1, "layer") == "1 layer"
    assert console.plural(2000, "layer") == "2,000 layers"


def test_places_are_shown_from_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert console.place_text(f"{tmp_path}/a.yaml:1:2") == "a.yaml:1:2"
    assert console.place_text("/elsewhere/a.yaml:1:2") == "/elsewhere/a.yaml:1:2"
