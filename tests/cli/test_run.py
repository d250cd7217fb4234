"""`specrt run`: text and ids, streamed or whole, with the numbers that it reports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import compiler
from tests.cli.conftest import DEMO, ROOT, Cli
from tests.golden_errors import check_golden

VERSE = "In the beginning God created the heaven and"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiler.compile(DEMO, out=tmp_path_factory.mktemp("run") / "bundle")


@pytest.mark.parametrize("how", [(), ("--no-stream",)])
def test_text_goes_to_stdout_and_speed_to_stderr(cli: Cli, bundle: Path, how: tuple[str, ...]) -> None:
    done = cli("run", bundle, "--prompt", VERSE, "-n", 8, *how)
    assert done.code == 0, done.err
    assert done.out == " heaven.\nAnd the LORD said\n"
    assert re.fullmatch(
        r"loaded in [\d.]+ s; prompt of \d+ tokens in [\d.]+ s \([\d,]+ tokens/s\); "
        r"8 new tokens in [\d.]+ s \([\d,]+ tokens/s after the first\)\n",
        done.err,
    )


def test_a_prompt_from_stdin(cli: Cli, bundle: Path) -> None:
    assert cli("run", bundle, "-n", 8, stdin=VERSE).out == cli("run", bundle, "-n", 8, "--prompt", VERSE).out


def test_ids_in_ids_out(cli: Cli, bundle: Path) -> None:
    done = cli("run", bundle, "--tokens", "5, 6,7", "-n", 4)
    assert done.code == 0, done.err
    assert len([int(token) for token in done.out.split(",")]) == 4


def test_json_has_the_documented_keys(cli: Cli, bundle: Path) -> None:
    done = cli("run", bundle, "--prompt", VERSE, "-n", 8, "--json")
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8").split("**run**")[1].split("**bench**")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert set(done.json) == {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert (done.json["text"], done.json["finish"]) == (" heaven.\nAnd the LORD said", "length")
    assert cli("run", bundle, "--tokens", "5", "-n", 1, "--json").json["decode_tokens_per_second"] is None


def test_sampling_is_repeatable_and_stops(cli: Cli, bundle: Path) -> None:
    drawn = ("run", bundle, "--prompt", VERSE, "-n", 20, "--temperature", 1, "--top-k", 50, "--top-p", 0.9, "--json")
    one, same, other = (cli(*drawn, "--seed", seed).json["tokens"] for seed in (1, 1, 2))
    assert one == same != other
    first = one[0]
    stopped = cli(*drawn, "--seed", 1, "--stop", first).json
    assert (stopped["tokens"], stopped["finish"]) == ([first], "stop")
    assert cli(*drawn, "--seed", 1, "--stop", "none").json["tokens"] == one


@pytest.mark.parametrize(
    ("golden", "arguments"),
    [
        ("CLI-013", ["--tokens", "1,x"]),
        ("CLI-013-both", ["--tokens", "1", "--prompt", "x"]),
        ("CLI-013-chat", ["--tokens", "1", "--chat"]),
        ("RUN-050", ["--chat", "--prompt", "x"]),
    ],
)
def test_mistakes(cli: Cli, bundle: Path, golden: str, arguments: list[str]) -> None:
    done = cli("run", bundle, *arguments)
    assert (done.code, done.out) == (1, "")
    check_golden(golden, done.err)


def test_beams_are_printed_best_first(cli: Cli, bundle: Path) -> None:
    how = ("--prompt", VERSE, "-n", 8, "--num-beams", 3, "--num-return-sequences", 2, "--early-stopping", "never")
    done = cli("run", bundle, *how)
    assert done.code == 0, done.err
    found = cli("run", bundle, *how, "--length-penalty", 1.0, "--json").json
    assert done.out.startswith(found["text"] + "\n")
    assert re.fullmatch(
        r"loaded in [\d.]+ s; prompt of \d+ tokens, best of the beams 8 tokens, in [\d.]+ s\n", done.err
    )
    assert found["beams"][0]["tokens"] == found["tokens"]
    assert found["beams"][0]["score"] >= found["beams"][1]["score"]
    assert len(found["beams"]) == 2
    assert "RUN-022" in cli("run", bundle, *how, "--temperature", 0.5).err
