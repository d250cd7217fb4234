"""`specrt bench`: keys of its record, sums that hold, and what is beyond a bundle's limits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import compiler
from compiler.benchmark import Reads
from runtime.bundle import Bundle
from tests.cli.conftest import DEMO, ROOT, Cli
from tests.golden_errors import check_golden


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiler.compile(DEMO, out=tmp_path_factory.mktemp("bench") / "bundle", max_batch=2, max_sequence=64)


def test_a_record_has_the_documented_keys_and_its_sums_hold(cli: Cli, bundle: Path) -> None:
    done = cli("bench", bundle, "-w", "8x6x2", "-w", "4x1x1", "--runs", 2, "--json")
    assert done.code == 0, done.err
    record = done.json
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").split("**bench**")[1].split("**inspect**")[0]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    documented = {key for names, _ in rows for key in re.findall(r"`(\w+)`", names)}
    assert documented - {"choices"} == set(record)  # what only a GPU has
    assert record["build"] is None
    assert [entry["input_len"] for entry in record["first_token"]] == [4, 8]
    several, one = record["workloads"]
    entries = next(explained for names, explained in rows if "`workloads`" in names)
    assert set(several) <= set(re.findall(r"`(\w+)`", entries))
    assert several["runs"] == 2
    seconds, rate = several["seconds"], several["output_tokens_per_second"]
    assert rate["greatest"] == pytest.approx(2 * 6 / seconds["least"])
    assert several["decode_step_ms"]["median"] < 1e3 * seconds["median"]
    assert several["ttft_ms"]["median"] < 1e3 * seconds["greatest"]
    assert "decode_step_ms" not in one  # a request with one new token never decodes


def test_what_a_decode_step_reads_follows_from_shapes(bundle: Path) -> None:
    reads = Reads.of(Bundle.open(bundle))
    layers, width, ffn, vocab, kv = 6, 256, 704, 4096, 128
    weights = vocab * width + layers * (2 * width * width + 2 * width * kv + 3 * width * ffn)  # tied: read as the head
    assert reads.bytes(1, 0) == 4 * weights
    assert reads.bytes(3, 10) == 4 * (weights + 3 * 10 * 2 * layers * kv)


def test_experts_count_as_often_as_they_are_chosen(tmp_path: Path) -> None:
    spec = ROOT / "specs" / "models" / "mixtral.yaml"
    path = compiler.compile(spec, size="tiny", weights="random", out=tmp_path / "bundle", max_sequence=64)
    reads = Reads.of(Bundle.open(path))
    experts = sum(size for size, share in reads.weights if share < 1)
    assert {share for _, share in reads.weights} == {0.5, 1.0}  # 2 of 4
    assert reads.bytes(64, 0) - reads.bytes(1, 0) == pytest.approx(experts / 2)


def test_for_people(cli: Cli, bundle: Path) -> None:
    done = cli("bench", bundle, "-w", "8x6x2", "--runs", 1)
    assert done.code == 0, done.err
    assert "tiny-llama, fp32, OpenVINO" in done.out
    assert re.search(r"^8x6x2 +[\d,]+ +[\d,]+-[\d,]+ +[\d.]+ ms +[\d.]+ ms +[\d,]+ GB/s *$", done.out, re.M)


@pytest.mark.parametrize(
    ("golden", "arguments"),
    [("CLI-016", ["-w", "128x64"]), ("CLI-017", ["-w", "60x8x1"]), ("CLI-017-usual", [])],
)
def test_mistakes(cli: Cli, bundle: Path, golden: str, arguments: list[str]) -> None:
    done = cli("bench", bundle, *arguments)
    assert (done.code, done.out) == (1, "")
    check_golden(golden, done.err)
