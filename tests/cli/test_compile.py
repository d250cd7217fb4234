"""`compile` as a user meets it: what it makes and says, and that nothing half made is ever left to load."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.conftest import DEMO, ROOT, SPEC, Cli, start
from tests.golden_errors import check_golden

SLOW = "slow: {d_model: 512, layers: 24, heads: 8, d_ffn: 1536, vocab: 4096, eps: 1.0e-5, parameters: 86_008_320}"


@pytest.fixture(scope="module")
def slow_spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes long enough to write (0.3 GB of random weights) to be interrupted."""
    path = tmp_path_factory.mktemp("slow") / "slow.yaml"
    path.write_text(SPEC.read_text(encoding="utf-8") + f"  {SLOW}\n", encoding="utf-8")
    return path


def test_a_checkpoint_folder_alone_is_enough(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", "from compiler.cli import compile_main; compile_main()", str(DEMO)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    bundle = tmp_path / "build" / "tiny-llama-cpu-fp32"
    assert (bundle / "bundle.json").is_file()
    assert "compiled tiny-llama: 5.48M parameters, 6 layers, for cpu in fp32" in process.stdout
    assert "fused norm × 3, attention × 1" in process.stdout
    assert process.stdout.splitlines()[-1].split(None, 1)[1] == 'specrt run build/tiny-llama-cpu-fp32 --prompt "..."'
    assert process.stderr == ""


def test_json_has_the_documented_keys(cli: Cli, tmp_path: Path) -> None:
    done = cli("compile", DEMO, "--out", tmp_path / "b", "--precision", "bf16", "--dump", tmp_path / "dump", "--json")
    assert done.code == 0
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").split("**compile**")[1].split("\n**")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert set(done.json) == {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert done.json["precision"] == "bf16"
    assert done.json["bundle_bytes"] == sum(
        item.stat().st_size for item in (tmp_path / "b").rglob("*") if item.is_file()
    )
    assert sorted(item.name for item in (tmp_path / "dump").iterdir())[0] == "00_input.ir"


def test_a_deployment_file(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    path.write_text(
        f"deployment: 1\ncheckpoint: {DEMO}\nlimits: {{max_batch: 2, max_sequence: 64}}\nout: made\n", "utf-8"
    )
    done = cli("compile", path, "--json")
    assert done.code == 0
    assert done.json["limits"] == {"max_batch": 2, "max_sequence": 64}
    assert (tmp_path / "made" / "bundle.json").is_file()


def test_random_weights_need_no_checkpoint(cli: Cli, tmp_path: Path) -> None:
    arguments = ["compile", SPEC, "--size", "demo", "--out", tmp_path / "b"]
    done = cli(*arguments)
    assert done.code == 1
    check_golden("CKPT-020", done.err)
    assert cli(*arguments, "--weights", "random").code == 0


# -- mistakes -------------------------------------------------------------------------------------------------------


def test_no_such_source(cli: Cli) -> None:
    done = cli("compile", "no/such/folder")
    assert done.code == 1
    check_golden("SPEC-067", done.err)


def test_two_checkpoints(cli: Cli) -> None:
    done = cli("compile", DEMO, DEMO)
    assert done.code == 1
    check_golden("SPEC-067-two", done.err)


def test_an_architecture_alone(cli: Cli) -> None:
    done = cli("compile", SPEC)
    assert done.code == 1
    check_golden("SPEC-066", done.err)


def test_the_golden_error_of_a_spec_reaches_the_user(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(SPEC.read_text(encoding="utf-8").replace("norm_2(x)", "norm_1(x)"), encoding="utf-8")
    done = cli("compile", path, "--size", "demo", "--weights", "random")
    assert done.code == 1
    assert re.search(r"error\[SPEC-\d+\]: .*norm_", done.err)
    assert re.search(r"--> .*wrong.yaml:\d+:\d+", done.err)


def test_out_is_something_else(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear", encoding="utf-8")
    done = cli("compile", DEMO, "--out", tmp_path / "full")
    assert done.code == 1
    check_golden("BUNDLE-010", done.err)
    assert (tmp_path / "full" / "letter.txt").read_text(encoding="utf-8") == "dear"
    done = cli("compile", DEMO, "--out", tmp_path / "full" / "letter.txt")
    check_golden("BUNDLE-010-file", done.err)


def test_out_can_not_be_written(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    done = cli("compile", DEMO, "--out", tmp_path / "file" / "bundle")
    assert (done.code, done.out) == (1, "")
    check_golden("BUNDLE-011", done.err)


def _mount_prefix() -> list[str] | None:
    """A command under which a tmpfs may be mounted, without touching anything outside."""
    for prefix in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        probe = [*prefix, "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
        if shutil.which("unshare") and subprocess.run(probe, capture_output=True).returncode == 0:
            return prefix
    return None


def test_a_full_disk(tmp_path: Path) -> None:
    prefix = _mount_prefix()
    if prefix is None:
        pytest.skip("mounting a tmpfs needs root or user namespaces, and this machine allows neither")
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=4m none {disk} && "
        f"{{ {sys.executable} -m compiler.cli compile {DEMO} --out {disk}/bundle; code=$?; ls -A {disk}; exit $code; }}"
    )
    done = subprocess.run([*prefix, "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    check_golden("BUNDLE-012", re.sub(r"\(\d+ MB free\)", "(N MB free)", done.stderr))


# -- interruptions --------------------------------------------------------------------------------------------------


def _partial(folder: Path) -> list[Path]:
    return [item for item in folder.iterdir() if item.name.endswith(".partial")]


def _interrupt(spec: Path, out: Path, number: int) -> tuple[int, str]:
    """Start a compile, send it a signal while it writes, and give its exit code and stderr."""
    process = start(["compile", spec, "--size", "slow", "--weights", "random", "--out", out])
    deadline = time.monotonic() + 120
    while not (out.parent.is_dir() and any(any(item.rglob("*.ir")) for item in _partial(out.parent))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_leaves_nothing(slow_spec: Path, tmp_path: Path, number: int, code: int) -> None:
    ended, err = _interrupt(slow_spec, tmp_path / "out" / "bundle", number)
    assert ended == code
    assert "Traceback" not in err
    assert list((tmp_path / "out").iterdir()) == []


def test_killed_leaves_nothing_that_loads(slow_spec: Path, tmp_path: Path, cli: Cli) -> None:
    import runtime
    from specs.errors import SpecRTError

    out = tmp_path / "out" / "bundle"
    ended, _ = _interrupt(slow_spec, out, signal.SIGKILL)
    assert ended == -signal.SIGKILL
    assert not out.exists()
    (partial,) = _partial(out.parent)
    with pytest.raises(SpecRTError):
        runtime.load(partial)
    assert cli("compile", DEMO, "--out", out).code == 0
    assert sorted(item.name for item in out.parent.iterdir()) == ["bundle"]


def test_killed_leaves_the_bundle_that_was_there(slow_spec: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "bundle"
    assert cli("compile", DEMO, "--out", out).code == 0
    before = (out / "bundle.json").read_bytes()
    assert _interrupt(slow_spec, out, signal.SIGKILL)[0] == -signal.SIGKILL
    assert (out / "bundle.json").read_bytes() == before
    assert json.loads(before)["name"] == "tiny-llama"
