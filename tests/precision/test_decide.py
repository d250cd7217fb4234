"""Facts as data: every file reads, decisions follow from them, and a combination that can't run says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler.precision import decide, require
from specs.hardware import gpu_names, load_gpu, load_toolchain, toolchain_names
from specs.precision import FOLDER, load_recipe, recipe_names, with_cache
from tests.golden_errors import check_raises


def pairs() -> list[tuple[str, str | None]]:
    return [
        (toolchain, gpu)
        for toolchain in toolchain_names()
        for gpu in (gpu_names() if load_toolchain(toolchain).sm else (None,))
    ]


def outcome(recipe: str, toolchain: str, gpu: str | None) -> str | None:
    return decide(load_recipe(recipe), load_toolchain(toolchain), None if gpu is None else load_gpu(gpu)).how


def test_every_combination_is_decided_with_reasons() -> None:
    for recipe in recipe_names():
        for toolchain, gpu in pairs():
            found = decide(load_recipe(recipe), load_toolchain(toolchain), None if gpu is None else load_gpu(gpu))
            assert found.works == (found.how is not None)
            assert all(reason.text for reason in found.reasons)
            assert found.works == all(reason["ok"] for reason in found.as_dict()["reasons"])


@pytest.mark.parametrize(
    ("recipe", "toolchain", "gpu", "how"),
    [
        # the reference system's table of architectures (facts/support-matrices.md), with its footnotes
        ("fp16", "tensorrt-8.6", "sm70", "plain"),
        ("bf16", "tensorrt-8.6", "sm90", "kernel"),  # 8.6 has no BF16: kernels alone
        ("bf16", "tensorrt-8.6", "sm75", None),
        ("bf16", "tensorrt-10.0", "sm75", None),
        ("bf16", "tensorrt-10.0", "sm80", "plain"),
        ("fp8", "tensorrt-10.8", "sm80", None),
        ("fp8", "tensorrt-10.8", "sm89", "native"),
        ("fp8", "tensorrt-8.6", "sm90", "kernel"),
        ("w8a8_sq_static", "tensorrt-8.6", "sm80", "native"),
        ("w8a8_sq", "tensorrt-8.6", "sm70", "kernel"),
        ("w4a16", "tensorrt-8.6", "sm90", "kernel"),
        ("w4a16", "tensorrt-10.0", "sm90", "native"),
        ("nvfp4", "tensorrt-10.8", "sm100", "native"),
        ("nvfp4", "tensorrt-10.8", "sm90", "kernel"),  # rounded as it says, multiplied in 16 bits
        ("nvfp4", "tensorrt-8.6", "sm70", "kernel"),
        ("mxfp8", "tensorrt-10.16", "sm100", "native"),
        ("mxfp8", "tensorrt-8.6", "sm90", "kernel"),  # in E4M3
        ("mxfp8", "tensorrt-10.16", "sm120", "kernel"),
        ("mxfp8", "tensorrt-10.16", "sm80", None),
        ("mxfp4", "tensorrt-8.6", "sm90", "kernel"),
        ("w4a8", "tensorrt-8.6", "sm90", "kernel"),
        ("w4a8", "tensorrt-8.6", "sm75", "kernel"),
        ("fp8_block", "tensorrt-8.6", "sm90", "kernel"),
        ("fp8_block", "tensorrt-11.4", "sm80", None),
        ("fp8_block", "openvino", None, "emulate"),
        ("fp16", "tensorrt-10.8", "sm70", None),  # Volta left after 10.4
        ("w8a16", "openvino", None, "native"),
        ("w4a16_awq", "openvino", None, "native"),
        ("w8a8_block", "openvino", None, "native"),
        ("w4a8", "openvino", None, "native"),
        ("w8a8_sq_static", "openvino", None, "native"),
        ("w8a8_sq", "openvino", None, "emulate"),
        ("fp8_rowwise", "openvino", None, "emulate"),
        ("tf32", "openvino", None, None),
    ],
)
def test_decisions(recipe: str, toolchain: str, gpu: str | None, how: str | None) -> None:
    assert outcome(recipe, toolchain, gpu) == how


def test_codes_beside_a_base_precision_without_engines() -> None:
    """Whatever the toolchain calls native is a kernel then too, and the reason says so."""
    for name in ("w4a16", "w8a8_sq_static", "fp8"):
        recipe = load_recipe(name).model_copy(update={"base": ("bf16",)})
        found = decide(recipe, load_toolchain("tensorrt-8.6"), load_gpu("sm90"))
        assert (found.how, found.base, found.alone) == ("kernel", "bf16", True)
        (told,) = (reason.text for reason in found.reasons if reason.code == "toolchain-product")
        assert told.startswith("kernel: ")


def test_hazards_are_lints() -> None:
    found = decide(load_recipe("w8a8_sq"), load_toolchain("tensorrt-11.4"), load_gpu("sm103"))
    assert found.works
    assert "a thirtieth of SM100" in found.lints[0].text
    found = decide(load_recipe("fp8"), load_toolchain("tensorrt-11.4"), load_gpu("sm121"))
    assert any("FP16 rate" in lint.text for lint in found.lints)


def test_what_cannot_run_says_why_and_what_could() -> None:
    fp8 = decide(load_recipe("fp8"), load_toolchain("tensorrt-10.8"), load_gpu("sm80"))
    check_raises("PREC-010", require, fp8)
    check_raises("PREC-010-base", require, decide(load_recipe("bf16"), load_toolchain("tensorrt-10.0"), load_gpu("t4")))
    check_raises(
        "PREC-010-toolchain", require, decide(load_recipe("w8a8_sq"), load_toolchain("tensorrt-10.8"), load_gpu("sm70"))
    )
    mxfp8 = decide(load_recipe("mxfp8"), load_toolchain("tensorrt-10.16"), load_gpu("sm80"))
    check_raises("PREC-010-units", require, mxfp8)
    check_raises("PREC-010-cpu", require, decide(load_recipe("tf32"), load_toolchain("openvino")))


def test_names() -> None:
    check_raises("PREC-001", load_recipe, "int9")
    check_raises("PREC-003", load_gpu, "sm42")
    check_raises("PREC-003-toolchain", load_toolchain, "tensorrt-7")
    assert load_gpu("h200").sm == 90


_BROKEN = {
    "group": ("per: group, group: [128, 64, 32], otherwise: row, ", "per: group, "),
    "zero": ("type: i4", "type: u4"),
    "version": ("precision: 1", "precision: 2"),
    "compute": ("base: [bf16", "compute: int8\nbase: [bf16"),
    "calibration": ("weights:", "smooth: {method: awq}\nweights:"),
}


@pytest.mark.parametrize("name", _BROKEN)
def test_a_recipe_that_contradicts_itself(name: str, tmp_path: Path) -> None:
    old, new = _BROKEN[name]
    text = (FOLDER / "w4a16.yaml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "w4a16.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    check_raises(f"PREC-002-{name}", load_recipe, path)


def test_a_recipe_has_no_unknown_keys(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((FOLDER / "w4a16.yaml").read_text(encoding="utf-8").replace("otherwise:", "otherwize:"))
    check_raises("SPEC-004-recipe", load_recipe, path)


@pytest.mark.parametrize(
    ("cache", "toolchain", "gpu", "works", "told"),
    [
        ("int8", "openvino", None, True, "int8, native"),
        ("fp8", "openvino", None, True, "no gain in memory"),
        ("int8", "tensorrt-8.6", "sm70", True, "int8, kernel"),
        ("fp8", "tensorrt-8.6", "sm80", True, "fp8, kernel"),
        ("fp8", "tensorrt-8.6", "sm75", False, "sm75 can't convert from FP8"),
    ],
)
def test_caches(cache: str, toolchain: str, gpu: str | None, works: bool, told: str) -> None:
    recipe = with_cache(load_recipe("fp16"), cache)
    found = decide(recipe, load_toolchain(toolchain), None if gpu is None else load_gpu(gpu))
    assert found.works == works
    (reason,) = (reason for reason in found.reasons if reason.code == "kv-cache")
    assert told in reason.text
