"""`specrt validate` and `specrt fit` as a user runs them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import compiler
from tests.cli.conftest import DEMO, ROOT, SPEC, Cli, cli  # noqa: F401 (a fixture)
from tests.golden_errors import check_golden, check_raises

SMALL = ("--precisions", "fp32,bf16", "--gpus", "sm80,sm90", "--toolchains", "tensorrt-10.8")


def documented(section: str) -> set[str]:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    found = re.search(rf"^\*\*{section}\*\*\n(.*?)(?=^\*\*|\Z)", text, re.M | re.S)
    assert found is not None
    rows = [line.split("|")[1] for line in found[1].splitlines() if line.startswith("| `")]
    return {key for row in rows for key in re.findall(r"`(\w+)`", row)}


def test_a_report_is_written(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    done = cli("validate", SPEC, *SMALL, "--out", tmp_path, "--jobs", 1)
    assert done.code == 0, done.err
    assert re.search(r"^Emulated +2 ", done.out, re.M)
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (content["schema"], len(content["cells"])) == (1, 2 * (2 + 1))
    assert {path.name for path in tmp_path.iterdir()} == {"cells", "index.html", "report.json", "report.md"}
    again = cli("validate", SPEC, *SMALL, "--out", tmp_path, "--json")
    assert set(again.json) == documented("validate")
    assert again.json["totals"]["emulated"] == 2


def test_a_trace_finds_a_planted_fault_and_exits_with_1(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(SPEC.read_text(encoding="utf-8").replace("theta: theta, sc", "theta: theta + 1, sc"))
    bundle = compiler.compile(wrong, DEMO, out=tmp_path / "b")
    done = cli("validate", "--trace", bundle, DEMO)
    assert done.code == 1
    assert "first divergence: rope.angle" in done.out
    assert re.search(r"--> specs/models/llama.yaml:\d+:\d+", done.out)
    as_json = cli("validate", "--trace", bundle, DEMO, "--json").json
    assert set(as_json) == documented("validate --trace")
    assert as_json["first"]["value"] == "rope.angle"


def test_a_trace_of_a_good_bundle(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    bundle = compiler.compile(DEMO, out=tmp_path / "b")
    done = cli("validate", "--trace", bundle, DEMO, "--tokens", "5,6,7,8")
    assert done.code == 0
    assert re.match(r"all \d+ values are within their bounds", done.out)


@pytest.mark.parametrize(
    ("golden", "arguments"),
    [
        ("VAL-007", ["validate"]),
        ("VAL-007-precision", ["validate", SPEC, "--precisions", "fp7"]),
        ("VAL-007-trace", ["validate", "--trace", "b"]),
        ("VAL-009", ["validate", "--matrix", "theirs"]),
        ("VAL-008", ["fit", SPEC, "--size", "7b", "--prices", ROOT / "tests" / "data" / "prices-unknown.yaml"]),
        ("VAL-008-kind", ["fit", SPEC, "--size", "7b", "--prices", ROOT / "tests" / "data" / "prices-words.yaml"]),
    ],
)
def test_mistakes(cli: Cli, golden: str, arguments: list[object]) -> None:  # noqa: F811
    done = cli(*arguments)
    assert (done.code, done.out) == (1, "")
    check_golden(golden, done.err)


def test_fit_ranks_what_holds_the_load(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    done = cli("fit", SPEC, "--size", "70b", "--batch", 8, "--context", 4096, "--json")
    assert set(done.json) == documented("fit")
    rows = done.json["fits"]
    assert [row["holds"] for row in rows] == sorted((row["holds"] for row in rows), reverse=True)
    held = [row for row in rows if row["holds"]]
    assert [row["price"] for row in held] == sorted(row["price"] for row in held)
    assert all(row["weight_bytes"] + row["kv_bytes"] < 300e9 for row in held)
    (tmp_path / "prices.yaml").write_text("h200: 1.0\nl4: 2\n")
    priced = cli("fit", SPEC, "--size", "70b", "--prices", tmp_path / "prices.yaml", "--json").json["fits"]
    assert {row["part"] for row in priced} == {"h200", "l4"}
    assert priced[0]["part"] == "h200"
    assert "h200" in cli("fit", SPEC, "--size", "70b").out


def test_fit_knows_a_cache_of_codes(cli: Cli) -> None:  # noqa: F811
    asked = ("fit", SPEC, "--size", "70b", "--gpu", "h200", "--gpus", "1", "--precisions", "fp16", "--context", 4096,
             "--json")  # fmt: skip
    (wide,), (coded,) = (cli(*asked, *more).json["fits"] for more in ((), ("--kv-cache", "int8")))
    assert wide["kv_bytes"] == 4096 * 80 * 2 * 8 * 128 * 2
    assert coded["kv_bytes"] == 4096 * 80 * 2 * 8 * (128 + 8)
    assert "unknown kv_cache `int3`" in cli(*asked[:-1], "--kv-cache", "int3").err


def test_fit_knows_what_each_of_several_gpus_has(cli: Cli) -> None:  # noqa: F811
    asked = ("fit", SPEC, "--size", "7b", "--gpu", "h200", "--precisions", "fp16,w4a16", "--context", 4096, "--json")
    rows = {(row["gpus"], row["precision"]): row for row in cli(*asked, "--gpus", "1,2,4,3").json["fits"]}
    assert sorted(rows) == [
        (count, name) for count in (1, 2, 4) for name in ("fp16", "w4a16")
    ]  # 3 don't divide 32 heads
    whole = 2 * 32000 * 4096 + 2 * 4096 * 65  # the embedding, and the gains of norms
    one, two, four = (rows[count, "fp16"] for count in (1, 2, 4))
    assert one["weight_bytes"] == 2 * 6_738_415_616
    assert two["weight_bytes"] == whole + (one["weight_bytes"] - whole) / 2
    assert four["kv_bytes"] == one["kv_bytes"] / 4
    assert two["price"] == 2 * one["price"]
    # a fourth of 11008 inputs is no number of groups of 128: groups of 64, twice as many scales of 16 bits
    low, parts = rows[1, "w4a16"]["weight_bytes"], rows[4, "w4a16"]["weight_bytes"]
    down = 32 * 4096 * 11008
    assert parts == whole + (low - whole + down * (2 / 64 - 2 / 128)) / 4
    assert "`--gpus` is `none`" in cli(*asked[:-1], "--gpus", "none").err


@pytest.mark.ray
def test_on_a_local_ray_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of a cluster on this machine give what this process gives."""
    from compiler.validate.models import model_of
    from compiler.validate.run import emulate_all

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # both sides are this test
    models = [model_of(SPEC, None, None, None)]
    script = (
        "import ray, sys; ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)\n"
        "print(ray.get_runtime_context().gcs_address, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as cluster:
        assert cluster.stdout is not None
        address = next(line for line in cluster.stdout if re.match(r"[\d.]+:\d+$", line)).strip()
        ours = emulate_all(models, ["fp32", "bf16"], tmp_path / "ray", ray=address)
        cluster.communicate("", timeout=60)
    here = emulate_all(models, ["fp32", "bf16"], tmp_path / "here", jobs=2)
    assert ours.keys() == here.keys()
    for place, numbers in here.items():  # Ray's workers may have another number of threads, which sum in another order
        assert ours[place]["relative"] == pytest.approx(numbers["relative"], rel=0.05, abs=1e-5)


@pytest.mark.parametrize("golden", ["VAL-004", "VAL-004-installed"])
def test_no_ray(golden: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compiler.validate.models import model_of
    from compiler.validate.run import emulate_all

    def refuse(**_: object) -> None:
        raise ConnectionError("as ray.init after its own timeout")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=refuse) if golden == "VAL-004" else None)
    model = model_of(SPEC, None, None, None)
    check_raises(golden, emulate_all, [model], ["fp32"], tmp_path, ray="127.0.0.1:6379")


def test_the_matrix_of_another_system() -> None:
    """The seed table had 71 of 135 cells; every row names a spec and one of its sizes, every column a recipe."""
    from compiler.validate.models import MODELS
    from specs.hardware import load_gpu
    from specs.matrix import load_matrix, matrix_names
    from specs.precision import load_recipe
    from specs.schema import load_spec

    for name in matrix_names():
        matrix = load_matrix(name)
        assert (len(matrix.rows), len(matrix.precisions)) == (15, 9)
        assert sum(len(row.had) for row in matrix.rows.values()) == 71
        for row in matrix.rows.values():
            assert row.size in load_spec(MODELS / f"{row.spec}.yaml").sizes
            assert set(row.had) <= set(matrix.precisions)
        assert all(load_recipe(precision) and precision for precision in matrix.precisions)
        assert all(load_gpu(gpu).sm for gpu in matrix.gpus)
