"""inspect, explain and doctor, and the pictures."""

from __future__ import annotations

import json
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import compiler
from compiler.draw import mermaid, scene, svg
from compiler.draw.layout import Box, place, spread
from compiler.draw.scene import Scene
from compiler.explain import explain
from compiler.ir.parser import parse
from compiler.sizes import sizes
from compiler.stages import stage
from tests.cli.conftest import DEMO, ROOT, SPEC, Cli
from tests.golden_errors import check_golden

NAMES = ["built", "fuse_norm", "fuse_attention", "insert_kv_cache", "pack_tokens"]


@pytest.fixture(scope="module")
def demo() -> compiler.Prepared:
    return compiler.prepare(DEMO)


# -- sizes and stages -----------------------------------------------------------------------------------------------


def test_sizes_add_up(demo: compiler.Prepared) -> None:
    found = sizes(demo)
    assert found.parameters == sum(part.parameters for part in found.parts) == demo.built.parameters == 5_475_584
    assert found.weight_bytes == 4 * found.parameters
    # K and V of 4 heads of 32 floats in 6 layers
    assert found.cache_bytes_per_token == 2 * 4 * 32 * 4 * 6
    attention = next(part for part in found.parts if part.part == "attn")
    assert (attention.layers, attention.tensors) == (6, 24)


def test_sizes_follow_precision() -> None:
    found = sizes(compiler.prepare(DEMO, precision="bf16"))
    assert found.weight_bytes == 2 * found.parameters
    assert found.cache_bytes_per_token == 2 * 4 * 32 * 2 * 6


@pytest.mark.parametrize("size", ["7b", "13b", "70b", "8b", "demo"])
def test_sizes_of_published_models(size: str) -> None:
    prepared = compiler.prepare(SPEC, size=size)
    assert sizes(prepared).parameters == prepared.source.parameters


def test_stages_by_number_and_name(demo: compiler.Prepared) -> None:
    assert stage(demo, "built").graph == demo.built.graph
    assert stage(demo, "0").graph == demo.built.graph
    assert stage(demo, "final").graph == demo.graph
    assert stage(demo, str(len(demo.reports))).graph == demo.graph
    assert stage(demo, "fuse_norm") == stage(demo, "1")
    assert stage(demo, "02").name == "fuse_attention"


# -- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_prints_text_that_parses(cli: Cli, demo: compiler.Prepared) -> None:
    done = cli("inspect", DEMO, "--ir")
    assert done.code == 0
    assert parse(done.out) == demo.graph


def test_inspect_without_flags_tells_what_it_is(cli: Cli) -> None:
    done = cli("inspect", DEMO)
    assert done.code == 0
    for told in ("5.48M parameters", "cpu in fp32", "fuse_attention", "norm_f", "KV cache"):
        assert told in done.out


def test_inspect_as_json(cli: Cli) -> None:
    content = cli("inspect", SPEC, "--size", "70b", "--stage", "built", "--plan", "--json").json
    assert content["kind"] == "source"
    assert content["config"]["layers"] == 80
    assert [item["name"] for item in content["stages"]][: len(NAMES)] == NAMES
    assert content["stage"] == {"number": 0, "name": "built"}
    assert len(content["plan"]["cache"]["layers"]) == 80
    assert "ir" not in content


def test_inspect_plan(cli: Cli) -> None:
    done = cli("inspect", DEMO, "--plan")
    assert done.code == 0
    assert "step 0" in done.out
    assert "block_ids" in done.out


# -- explain --------------------------------------------------------------------------------------------------------


def test_stages_of_a_pipeline(cli: Cli) -> None:
    given = [SPEC, "--size", "demo", "--target", "sm90", "--toolchain", "tensorrt-8.6", "--precision", "bf16"]
    given += ["--pipeline-parallel", 2]
    done = cli("inspect", *given, "--plan", "--json")
    first = done.json["plan"]["stages"][1]
    assert 0 < first < len(done.json["plan"]["steps"]) - 1
    shown = cli("inspect", *given, "--plan").out
    assert shown.index(f"step {first - 1} ") < shown.index("stage 1 of the pipeline") < shown.index(f"step {first} ")
    told = {fact["subject"]: fact["text"] for fact in cli("explain", *given, "--json").json["facts"]}
    assert re.fullmatch(
        rf"0: steps 0 to {first - 1}, .* attentions?; 1: steps {first} to \d+, .* attentions?", told["stages"]
    )


def test_what_several_gpus_share(cli: Cli) -> None:
    given = [SPEC, "--size", "demo", "--target", "sm90", "--toolchain", "tensorrt-8.6", "--precision", "bf16"]
    done = cli("explain", *given, "--tensor-parallel", 2, "--json").json
    told = {fact["subject"]: fact["text"] for fact in done["facts"]}
    assert told["tensor"] == (
        "2 GPUs share each product; by outputs: attn.q, attn.k, attn.v, mlp.gate, mlp.up, head; "
        "by inputs, then added up: attn.o, mlp.down; by heads: attn.attention"
    )
    assert told["ranks"].endswith("bytes of cache a token are a rank's; a step has 12 all_reduce and 1 all_gather")
    assert done["passes"][-1]["name"] == "split_tensors"
    moe = ROOT / "specs" / "models" / "mixtral.yaml"
    kept = cli("explain", moe, "--size", "tiny", "--target", "sm90", "--precision", "fp16", "--tensor-parallel", 4)
    assert "whole moe.router: `softmax` needs all of %moe.router" in kept.out
    assert "by heads, those of keys and values in copies: attn.attention" in kept.out


def test_explain_tells_hits_and_places(cli: Cli) -> None:
    done = cli("explain", DEMO)
    assert done.code == 0
    assert "✓ attention at %attn.joined  specs/models/llama.yaml:" in done.out
    assert "decoder, because `attn` has mask `causal`" in done.out


def test_explain_counts_every_layer(demo: compiler.Prepared) -> None:
    found = {(item.op, item.answer): item for item in explain(demo).operations}
    assert found["paged_attention", "emit"].times == 6
    assert all(item.answer in ("emit", "decompose") for item in found.values())
    json.dumps(explain(demo).as_dict())


def test_explain_gives_the_reason_of_a_refusal(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from compiler.passes import pipelines

    monkeypatch.setattr(pipelines, "decoder", lambda *_, **__: (*pipelines.FUSION, *pipelines.JOIN_PRODUCTS))
    text = SPEC.read_text(encoding="utf-8").replace("{kind: gated_mlp, act: activation", "{kind: mlp, act: activation")
    text = (
        text.replace('mlp.gate: "model.layers.{i}.mlp.gate_proj", ', "")
        .replace("5_475_584", "4_394_240")
        .replace("| 'silu'", "| 'gelu'")
    )
    path = tmp_path / "other.yaml"
    path.write_text(text, encoding="utf-8")
    done = cli("explain", path, "--size", "demo")
    assert done.code == 0, done.err
    assert "✗ gated_gelu at %mlp.act" in done.out
    assert "is used by matmul where the rule has" in done.out


# -- doctor ---------------------------------------------------------------------------------------------------------


def test_doctor(cli: Cli) -> None:
    done = cli("doctor")
    assert done.code == 0
    assert "openvino" in done.out
    content = cli("doctor", "--json").json
    assert content["problems"] == []
    assert content["cpu"]["cores"] >= 1
    assert content["packages"]["torch"]


def test_doctor_says_what_is_missing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from compiler import doctor

    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    done = cli("doctor")
    assert done.code == 1
    assert "`no-such-package` is not installed" in done.out


# -- pictures -------------------------------------------------------------------------------------------------------


def _all(what: Scene) -> list[str]:
    return [name for node in what.nodes for name in (node.id, *(_all(node.inner) if node.inner else ()))]


@pytest.mark.parametrize("which", ["built", "final"])
def test_scene_has_every_computed_value(demo: compiler.Prepared, which: str) -> None:
    graph = stage(demo, which).graph
    ids = _all(scene(graph))
    assert len(ids) == len(set(ids))
    ops = [node.title for node in scene(graph).nodes]
    assert "repeat × 6" in ops
    assert "weight" not in ops
    for edge in scene(graph).edges:
        assert {edge.source, edge.target} <= set(ids)


@pytest.mark.parametrize("which", ["built", "final"])
def test_svg_is_a_file_by_itself(demo: compiler.Prepared, which: str) -> None:
    text = svg(stage(demo, which).graph)
    root = ElementTree.fromstring(text)
    width, height = (float(root.attrib[name]) for name in ("width", "height"))
    assert 300 < width < 2000
    assert 300 < height < 6000
    assert "href" not in text
    assert "<script" not in text
    assert "nan" not in text


def test_boxes_do_not_overlap(demo: compiler.Prepared) -> None:
    inner = next(node.inner for node in scene(stage(demo, "built").graph).nodes if node.inner is not None)
    boxes = {node.id: Box(120.0, 40.0) for node in inner.nodes}
    layout = place(boxes, [(edge.source, edge.target) for edge in inner.edges])
    names = list(boxes)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            apart_x = abs(layout.x[one] - layout.x[other]) >= 120.0
            apart_y = abs(layout.y[one] - layout.y[other]) >= 40.0
            assert apart_x or apart_y, (one, other)
    for edge in inner.edges:
        assert layout.y[edge.source] + 40.0 <= layout.y[edge.target]


def test_spread_keeps_gaps_and_moves_as_little_as_it_can() -> None:
    assert spread([0.0, 10.0], [1.0, 1.0], [5.0]) == [0.0, 10.0]
    assert spread([0.0, 0.0], [1.0, 1.0], [4.0]) == [-2.0, 2.0]
    assert spread([0.0, 0.0], [3.0, 1.0], [4.0]) == [-1.0, 3.0]
    assert spread([], [], []) == []


def test_mermaid_is_balanced(cli: Cli, demo: compiler.Prepared) -> None:
    text = mermaid(demo.graph)
    lines = text.splitlines()
    assert lines[0] == "flowchart TD"
    assert (
        sum(line.strip().startswith("subgraph") for line in lines) == sum(line.strip() == "end" for line in lines) == 1
    )
    assert all(line.count('"') % 2 == 0 for line in lines)
    assert cli("inspect", DEMO, "--mermaid").out == text


def test_svg_of_a_spec_is_written(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "new" / "graph.svg"
    done = cli("inspect", SPEC, "--size", "7b", "--svg", path)
    assert (done.code, done.out) == (0, f"wrote {path}\n")
    assert path.read_text(encoding="utf-8").startswith("<svg")


def test_the_picture_in_the_readme_is_current(demo: compiler.Prepared) -> None:
    path = ROOT / "docs" / "graph.svg"
    if os.environ.get("UPDATE_GOLDENS"):
        path.write_text(svg(demo.graph), encoding="utf-8")
    again = "run `specrt inspect demo/tiny-llama --svg docs/graph.svg` and look at it"
    assert path.read_text(encoding="utf-8") == svg(demo.graph), again


# -- bundles ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiler.compile(DEMO, out=tmp_path_factory.mktemp("looking") / "bundle")


def test_doctor_loads_a_bundle(cli: Cli, bundle: Path) -> None:
    done = cli("doctor", bundle, "--json")
    assert done.code == 0, done.out
    found = done.json["bundle"]
    assert (found["loads"], found["error"]) == (True, None)
    assert [step["name"] for step in found["steps"]] == ["files", "made with", "loads", "runs"]


def test_doctor_says_why_a_bundle_does_not_load(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "damaged")
    engine = next((tmp_path / "damaged" / "engine").glob("*.bin"))
    engine.write_bytes(engine.read_bytes()[:-7])
    done = cli("doctor", tmp_path / "damaged")
    assert done.code == 1
    assert "error[BUNDLE-006]" in done.out


def test_a_bundle_can_not_be_compiled_otherwise(cli: Cli, bundle: Path) -> None:
    done = cli("inspect", bundle, "--precision", "bf16")
    assert done.code == 1
    check_golden("CLI-015", done.err)


# -- infer ------------------------------------------------------------------------------------------------------------


def test_infer_writes_a_draft_that_compiles(cli: Cli, tmp_path: Path) -> None:
    done = cli("infer", DEMO, "--out", tmp_path / "draft.yaml")
    assert done.code == 0, done.err
    assert "every tensor has its place" in done.out
    assert "things to check" in done.out
    assert f"specrt inspect {tmp_path / 'draft.yaml'}" in done.out
    assert compiler.prepare(tmp_path / "draft.yaml", DEMO).built.parameters == 5_475_584


def test_infer_prints_only_the_draft_on_stdout(cli: Cli, tmp_path: Path) -> None:
    done = cli("infer", DEMO)
    (tmp_path / "draft.yaml").write_text(done.out, encoding="utf-8")
    compiler.prepare(tmp_path / "draft.yaml", DEMO)
    assert "things to check" in done.err


# -- models -----------------------------------------------------------------------------------------------------------


def test_models_lists_every_spec(cli: Cli) -> None:
    found = {model["name"]: model for model in cli("models", "--json").json["models"]}
    assert len(found) == len(list((ROOT / "specs" / "models").glob("*.yaml")))
    assert found["llama"]["model_type"] == ["llama"]
    assert found["llama"]["when"] is None
    assert found["llama"]["sizes"]["7b"] == 6_738_415_616
    told = [found["llama"][key] for key in ("attention", "positions", "norms", "mlp")]
    assert told == ["multi-head or grouped", "rotary", "RMS: before each", "gated silu"]
    text = cli("models").out
    assert "MLP gated silu" in text
    assert "7b 6.74B" in text
