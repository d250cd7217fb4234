"""diff: goldens of its text, and what counts as a difference."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from specs.compare import compare, side
from specs.schema import load_spec
from specs.wiring import form
from specs.wording import Words, by_layer
from tests.cli.conftest import DEMO, ROOT, Cli
from tests.golden_errors import check_golden
from tests.specs.samples import SPEC, write_spec

GOLDENS = ROOT / "tests" / "golden" / "diff"
COPIES = "tests/data/diff"  # of specs as they once were, so that a change of a spec is no change here
LLAMA, GPT2, FALCON = (f"{COPIES}/{name}.yaml" for name in ("llama", "gpt2", "falcon"))
PAIRS = {
    "sizes": (f"{LLAMA}:8b", f"{LLAMA}:7b"),
    "files": (LLAMA, GPT2),
    "families": (f"{GPT2}:xl", f"{FALCON}:7b"),
    "variants": (f"{FALCON}:7b", f"{FALCON}:rw-1b"),
    "itself": (LLAMA, LLAMA),
}


@pytest.mark.parametrize("name", PAIRS)
def test_golden(name: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    done = cli("diff", *PAIRS[name])
    assert done.code == 0, done.err
    # what is alike is left out: it grows with every field that the schema gets
    text = "\n".join(line.rstrip() for line in done.out.splitlines()).partition("; they are alike in")[0] + "\n"
    path = GOLDENS / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDENS"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


LAYER = "      - h = norm_1(x)\n      - x = x + attn(h) + mlp(h)\n"
NORM_2 = "  mlp:    {kind: gated_mlp", "  norm_2: {kind: rms_norm, eps: 1.0e-5}\n  mlp:    {kind: gated_mlp"
# layer's equations: what is said of it
LAYERS = {
    LAYER: "attention and MLP side by side, both added to x from one norm of x",
    "      - x = mlp(norm_1(x)) + x + attn(norm_2(x))\n":
        "attention and MLP side by side, each added to x from its own norm of x",
    "      - y = x + attn(norm_2(x))\n      - x = y + mlp(norm_1(y))\n":
        "attention, then MLP, each added to x from its own norm of x",
    "      - x = norm_2(x + attn(x))\n      - x = norm_1(mlp(x) + x)\n":
        "attention, then MLP, each added to x and followed by a norm of the sum",
    "      - x = x + norm_1(attn(x))\n      - x = x + norm_2(mlp(x))\n":
        "attention, then MLP, each followed by a norm and added to x",
    "      - h = norm_1(x)\n      - x = 2 * h + attn(h)\n      - x = x + mlp(norm_2(x))\n":
        "h = norm_1(x); x = 2 * h + attn(h); x = x + mlp(norm_2(x))",
}  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_in_words_whatever_the_parts_are_called(layer: str, tmp_path: Path) -> None:
    old, new = NORM_2 if "norm_2" in layer else ("", "")
    spec = load_spec(write_spec(tmp_path, old, new, SPEC.replace(LAYER, layer)))
    assert form(spec, Words(spec, None)).layer.removeprefix("x = ") == LAYERS[layer]


def differences(tmp_path: Path, old: str, new: str) -> dict[str, tuple[str | None, str | None]]:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    found, _ = compare(side(str(write_spec(first))), side(str(write_spec(second, old, new))))
    return {f"{one.group}: {one.what}": (one.a, one.b) for one in found}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("hidden_size", "n_embd"),
        ("theta:    rope_theta | 10000.0", "theta:    rotary_base | 10000.0"),
        ("tie | false", "tied_embeddings | false"),
        ("{paper: none}", "{paper: another}"),
        ("num_layers", "n_layer | 12"),
    ],
)
def test_how_a_key_is_spelled_is_no_difference(tmp_path: Path, old: str, new: str) -> None:
    assert differences(tmp_path, old, new) == {}


def test_a_default_is(tmp_path: Path) -> None:
    assert differences(tmp_path, "rope_theta | 10000.0", "rope_theta | 500000.0") == {
        "attention: rotary base": ("config.json says, else 10000.0", "config.json says, else 500000.0")
    }


def test_details_go_with_what_they_detail(tmp_path: Path) -> None:
    alibi = "{kind: alibi, scaled: theta > 1}"
    found = differences(tmp_path, "{kind: rope, style: half, dims: d_head, theta: theta}", alibi)
    assert list(found) == ["attention: positions"]
    assert found["attention: positions"][0] is not None
    assert found["attention: positions"][0].startswith("rotary, pairs half")


def test_values_by_layer() -> None:
    assert by_layer(["8", "8"]) == "8"
    assert by_layer(["8", "none"] * 4) == "8, none in turn"
    assert by_layer(["dense", *["experts"] * 4]) == "dense in layer 0, experts from layer 1"
    assert by_layer([*"aabbbbabababbaab"]) == "a in 7 layers, b in 9 layers"


def test_a_checkpoint_and_a_size(cli: Cli) -> None:
    found = cli("diff", DEMO, "specs/models/llama.yaml:7b", "--json").json
    assert (found["a"]["name"], found["b"]["name"]) == ("tiny-llama", "llama:7b")
    counts = next(one for one in found["differences"] if one["what"] == "parameters")
    assert counts == {"group": "sizes", "what": "parameters", "a": "5,475,584", "b": "6,738,415,616"}
    assert {"group": "norms", "what": "kind", "text": "RMS norm"} in found["same"]


def test_what_is_none_of_the_three(cli: Cli) -> None:
    done = cli("diff", DEMO, "nowhere.yaml:7b")
    assert done.code == 1
    check_golden("SPEC-067-diff", done.err)
