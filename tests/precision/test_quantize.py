"""The pass and its plan: what is rewritten, what stays and why, layers with a precision of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

import compiler
from compiler.api import Prepared, prepare
from compiler.ir.core import walk
from compiler.ir.names import shift
from compiler.passes.quantization_plan import Storage, storage_of
from specs.precision import load_recipe
from tests.golden_errors import check_raises
from tests.precision.models import MODELS

LLAMA = MODELS / "llama.yaml"


def prepared(precision: str, **more: object) -> Prepared:
    return prepare(LLAMA, size="tiny", weights="random", max_sequence=64, precision=precision, **more)


def ops(found: Prepared) -> list[str]:
    return [equation.op for equation in walk(found.graph.equations)]


def test_weights_become_codes_and_scales() -> None:
    found = prepared("w4a16_asym")
    plan = found.precision.plan
    assert plan is not None
    assert len(plan.linears) == 2 * 7
    assert plan.kept.keys() == {"head.weight"}
    assert "logits are its outputs" in plan.kept["head.weight"]
    text = str(found.graph)
    assert 'u4[160,64] = weight() {name = "layers.{i}.mlp.up.weight.codes"}' in text
    assert 'f16[160,1] = weight() {name = "layers.{i}.mlp.up.weight.scale"}' in text  # 64 inputs: one group
    assert 'u4[64,5] = weight() {name = "layers.{i}.mlp.down.weight.zero"}' in text  # 160 inputs: five groups of 32
    assert ops(found).count("dequantize") == 7
    assert '"layers.{i}.mlp.up.weight"}' not in text


def test_inputs_are_rounded_once_for_all_that_read_them() -> None:
    found = prepared("w8a8")
    assert ops(found).count("dequantize") == 7 + 4  # weights; the inputs of q k v, of o, of gate and up, of down
    assert ops(found).count("row_scale") == 4


def test_smoothing_goes_into_the_norm_where_nothing_else_reads_it() -> None:
    plain, smooth = ops(prepared("w8a8")), ops(prepared("w8a8_sq"))
    # two norms take the factors into their gains; o and down get a product of their own
    assert smooth.count("mul") == plain.count("mul") + 4
    text = str(prepared("w8a8_sq").graph)
    assert text.count(".smooth") > 0
    for line in text.splitlines():
        if "rms_norm(" in line and "norm_1" in line:
            assert ".smooth)" in line


def test_layers_with_a_precision_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "deployment.yaml"
    path.write_text(
        f"deployment: 1\nmodel: {LLAMA}\nsize: tiny\nweights: random\nprecision: w4a16_asym\nlayers:\n"
        "  - {linears: layers.0.attn.*, precision: w8a16}\n  - {linears: '*.down', precision: fp32}\n"
    )
    found = prepare(path)
    plan = found.precision.plan
    assert plan is not None
    stored = {name: linear.storage.type for name, linear in plan.linears.items()}
    assert stored["layers.0.attn.q.weight"] == "i8"
    assert stored["layers.1.attn.q.weight"] == stored["layers.0.mlp.up.weight"] == "u4"
    assert "layers.0.mlp.down.weight" not in stored
    assert "base precision" in plan.kept["layers.1.mlp.down.weight"]
    repeats = [equation for equation in found.graph.equations if equation.op == "repeat"]
    assert [repeat.attr["count"] for repeat in repeats] == [1, 1]
    assert 'name = "layers.{i+1}.attn.q.weight.codes"' in str(found.graph)


def test_names_of_later_rounds() -> None:
    assert shift("layers.{i}.attn.k", 3) == "layers.{i+3}.attn.k"
    assert shift("layers.{2*i+1}.attn.k", 3) == "layers.{2*i+7}.attn.k"


@pytest.mark.parametrize(
    ("recipe", "shape", "scale", "block"),
    [
        ("w4a16", (8, 256), (8, 2), (1, 128)),
        ("w4a16", (8, 704), (8, 11), (1, 64)),
        ("w4a16", (8, 40), (8, 1), ()),
        ("w4a16", (3, 8, 64), (3, 8, 1), (1, 64)),
        ("w8a16", (8, 40), (8, 1), ()),
        ("w8a8_sq_tensor", (8, 40), (1, 1), ()),
        ("nvfp4", (8, 64), (8, 4), (1, 16)),
    ],
)
def test_storage(recipe: str, shape: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, ...]) -> None:
    found = storage_of(load_recipe(recipe), shape)
    assert isinstance(found, Storage)
    assert (found.scale_shape, found.block) == (scale, block)


def test_what_a_format_cannot_hold_stays_as_it_is_with_a_reason() -> None:
    assert storage_of(load_recipe("mxfp4"), (8, 40)) == "40 inputs are no multiple of 32"
    assert "that share a scale" in str(storage_of(load_recipe("w4a8"), (8, 40)))


def test_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "deployment.yaml"
    head = f"deployment: 1\nmodel: {LLAMA}\nsize: tiny\nweights: random\nprecision: w8a16\nlayers:\n"
    path.write_text(head + "  - {linears: '*.dwon', precision: w4a16}\n")
    check_raises("PREC-011", prepare, path)
    path.write_text(head + "  - {linears: '*.down', precision: bf16}\n")
    check_raises("PREC-015", prepare, path)
    out = tmp_path / "bundle"
    check_raises("PREC-012", compiler.compile, LLAMA, size="tiny", weights="random", precision="w4a16_awq", out=out)
    assert not out.exists()
