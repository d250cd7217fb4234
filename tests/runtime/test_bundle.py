"""Reading bundles: a whole one, and every way in which one can be broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compiler
import runtime
from runtime.bundle import Bundle
from tests.golden_errors import check_raises

DEMO = Path(__file__).parents[2] / "demo" / "tiny-llama"


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiler.compile(DEMO, out=tmp_path_factory.mktemp("runtime") / "bundle")


@pytest.fixture
def broken(demo_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "bundle.json") -> None:
    """Change a JSON file of a bundle, and what bundle.json says of it."""
    path = folder / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    if name != "bundle.json":
        from compiler.bundle import _sha256

        entry = {"size": path.stat().st_size, "sha256": _sha256(path)}
        rewrite(folder, lambda manifest: manifest["files"].update({name: entry}))


def test_a_whole_bundle(demo_bundle: Path) -> None:
    bundle = Bundle.open(demo_bundle)
    assert (bundle.name, bundle.role, bundle.vocab, bundle.stop) == ("tiny-llama", "decoder", 4096, (1,))
    assert (bundle.limits.max_batch, bundle.limits.max_sequence) == (8, 1024)
    assert bundle.tokenizer == demo_bundle / "tokenizer.json"
    assert bundle.program.cache is not None
    assert len(bundle.program.cache.layers) == 6
    assert bundle.program.cache.block_bytes == 6 * 32 * 4 * 64 * 4


def test_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_raises("BUNDLE-001", runtime.load, tmp_path)
    check_raises("BUNDLE-001-missing", runtime.load, tmp_path / "none")
    check_raises("BUNDLE-001-file", runtime.load, tmp_path / "file")


@pytest.mark.parametrize(
    ("golden", "change"),
    [
        ("BUNDLE-002-key", lambda manifest: manifest.pop("limits")),
        ("BUNDLE-002-files", lambda manifest: manifest.update(files=[])),
        ("BUNDLE-002-outside", lambda manifest: manifest["files"].update({"../x": {"size": 1, "sha256": ""}})),
        ("BUNDLE-002-entry", lambda manifest: manifest["files"].update({"plan.json": {"size": "big"}})),
        ("BUNDLE-002-plan", lambda manifest: manifest["files"].pop("plan.json")),
        ("BUNDLE-002-ranks", lambda manifest: manifest.update(parallel={"tensor": 2, "pipeline": 1})),
        ("BUNDLE-002-derive", lambda manifest: manifest.update(derive={"prefix": {"last": 3}})),
        ("BUNDLE-002-beams", lambda manifest: manifest["generation"].update(num_beams=True)),
        ("BUNDLE-002-role", lambda manifest: manifest.update(role="speaker")),
        ("BUNDLE-002-limits", lambda manifest: manifest["limits"].update(max_batch=0)),
        ("BUNDLE-002-tokenizer", lambda manifest: manifest.update(tokenizer="other.json")),
        ("BUNDLE-003", lambda manifest: manifest.update(format=2, specrt="0.2.0")),
        ("BUNDLE-004", lambda manifest: manifest["toolchain"].update(openvino="2025.1.0")),
    ],
)
def test_manifest(
    golden: str, change: Callable[[dict[str, Any]], object], broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.openvino_executable.metadata.version", lambda _: "2026.4.1")
    rewrite(broken, change)
    check_raises(golden, runtime.load, broken)


def test_manifest_is_no_json(broken: Path) -> None:
    (broken / "bundle.json").write_text('{"format": 1,')
    check_raises("BUNDLE-002", runtime.load, broken)
    (broken / "bundle.json").write_text("[]")
    check_raises("BUNDLE-002-array", runtime.load, broken)
    (broken / "bundle.json").write_bytes(b"\xff\xfe")
    check_raises("BUNDLE-002-bytes", runtime.load, broken)


def test_files(broken: Path) -> None:
    engine, tokenizer = broken / "engine" / "0.bin", broken / "tokenizer.json"
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)
    check_raises("BUNDLE-007", runtime.load, broken)
    assert Bundle.open(broken, verify=False)
    engine.write_bytes(data[:1000])
    check_raises("BUNDLE-006", runtime.load, broken)
    engine.write_bytes(bytes(data) + b"more")
    check_raises("BUNDLE-006-longer", runtime.load, broken)
    engine.unlink()
    check_raises("BUNDLE-005", runtime.load, broken)
    engine.mkdir()
    check_raises("BUNDLE-005-folder", runtime.load, broken)
    assert tokenizer.is_file()


@pytest.mark.parametrize(
    ("golden", "change"),
    [
        ("BUNDLE-008", lambda plan: plan.pop("steps")),
        ("BUNDLE-008-cache", lambda plan: plan["cache"]["layers"][0].update(dtype="f8")),
        ("BUNDLE-008-cache-kind", lambda plan: plan["cache"].update(kind="ring")),
        ("BUNDLE-008-file", lambda plan: plan["steps"][0].update(file="engine/1.xml")),
        ("BUNDLE-008-port", lambda plan: plan["inputs"][0].pop("name")),
        ("BUNDLE-009", lambda plan: plan["steps"][0].update(kind="kernel", backend="tensorrt")),
    ],
)
def test_plan(golden: str, change: Callable[[dict[str, Any]], object], broken: Path) -> None:
    rewrite(broken, change, "plan.json")
    check_raises(golden, runtime.load, broken)


def test_plan_is_no_json(broken: Path) -> None:
    (broken / "plan.json").write_text("{")
    from compiler.bundle import _sha256

    entry = {"size": 1, "sha256": _sha256(broken / "plan.json")}
    rewrite(broken, lambda manifest: manifest["files"].update({"plan.json": entry}))
    check_raises("BUNDLE-008-json", runtime.load, broken)


def test_threads(demo_bundle: Path) -> None:
    check_raises("RUN-016", runtime.load, demo_bundle, threads=0)
