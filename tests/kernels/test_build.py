"""Kernels compile for every GPU generation on a machine without one, and kernels.json says how to launch them."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compiler.ir.cache_rows import CODES
from compiler.ir.parser import parse
from compiler.kernels import attention as lib
from compiler.kernels import library
from compiler.kernels.build import ARCHITECTURES, SHARED, build, waits
from compiler.kernels.products import LEAST_FP8, LEAST_INT8, MANY, Product, product
from compiler.kernels.rows import program_of
from tests.golden_errors import check_raises
from tests.kernels.cases import FEATURES, attention, rounding
from tests.kernels.test_alone import WITHIN
from tests.kernels.test_rows import SEGMENT

VIEWS = {
    "q": {"offset": 0, "row": 128, "head": 16},
    "k": {"offset": 64, "row": 128, "head": 16},
    "v": {"offset": 96, "row": 128, "head": 16},
}
ATTRS: dict[str, Any] = {
    "heads": 4, "kv_heads": 2, "d_head": 16, "d_value": 16, **VIEWS, "scale": 0.25, "causal": True, "window": None,
    "softcap": None, "slopes": None, "codes": None, "bf16_bias": None, "k_cache": "0.k", "v_cache": "0.v",
    "rotary": {"style": "half", "pairs": 8},
}  # fmt: skip


def plan() -> dict[str, Any]:
    engine = {"kind": "engine", "file": "segments/a.ir"}
    step = {"kind": "kernel", "inputs": {"q": "qkv", "k": "qkv", "v": "qkv"}, "attrs": ATTRS}
    other = step | {"attrs": ATTRS | {"k_cache": "1.k", "v_cache": "1.v"}}
    layers = [{"k": f"{i}.k", "v": f"{i}.v", "heads": 2, "dim": 16, "value_dim": 16, "dtype": "f16"} for i in (0, 1)]
    return {
        "dims": {"T": [1, 8, 128], "B": [1, 1, 4], "N": [1, 1, 128], "P": [1, 4, 64]},
        "steps": [engine, step, engine, other],
        "values": {"qkv": {"dtype": "f16", "shape": ["T", 128]}},
        "cache": {"block_size": 16, "layers": layers},
        "weights": {
            "norm.weight": {"dtype": "f16", "shape": [64], "file": None, "random": {"normal": 1}},
            "up.codes": {"dtype": "u4", "shape": [64, 64], "file": None, "random": {"codes": [255, 0]}},
            "up.scale": {"dtype": "f16", "shape": [64, 1], "file": None, "random": {"bits": 7168, "bytes": 2}},
            "head.weight": {"dtype": "f16", "shape": [100, 64], "file": "weights.safetensors"},
        },
        "output_types": [{"name": "logits", "dtype": "f32", "shape": ["N", 100]}],
    }


def test_a_plan_gets_the_kernels_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib, "SPLITS", (1, 2, 8))  # of 8 parts some would have no tile of keys
    (tmp_path / "segments").mkdir()
    (tmp_path / "segments" / "a.ir").write_text(SEGMENT)
    library.write_kernels(plan(), tmp_path, [90])
    written = json.loads((tmp_path / "kernels" / "kernels.json").read_text())
    assert written["attention"] == {"1": 0, "3": 0}  # layers that are equal share a set
    (kernels,) = written["sets"]["sm90"]
    assert {len(program["calls"]) for program in written["programs"]["sm90"]["segments/a.ir"].values()} == {3}
    assert set(written["programs"]["sm90"]["segments/a.ir"]) == {"1", "16", "64", "128"}
    assert set(written["others"]) == {"choose", "carry", "normal.f16.1", "codes.255.0"}
    assert set(kernels) == {"append", "prefill", "decode1", "decode2"}
    for entry in written["kernels"].values():
        assert (tmp_path / entry["sm90"]["file"]).read_bytes()[:4] == b"\x7fELF"
        assert entry["sm90"]["overlap"] == (entry["sm90"]["entry"] not in ("normal", "codes"))  # they make weights
    assert written["kernels"][kernels["append"]]["arguments"] == [
        "q",
        "k",
        "v",
        "cos",
        "sin",
        "slots",
        "k_cache",
        "v_cache",
        "first",
    ]


def test_a_plan_gets_the_sums_of_its_ranks() -> None:
    """One kernel a type, whose counts are whole vectors where all widths are; none for more ranks than it takes."""

    def reductions(ranks: int) -> dict[str, lib.Launch]:
        values = {"x": {"dtype": "f16", "shape": ["T", 64]}, "y": {"dtype": "f16", "shape": ["T", 20]},
                  "z": {"dtype": "f32", "shape": ["T", 20]}}  # fmt: skip
        steps = [
            {"kind": "collective", "name": "all_reduce", "inputs": {"x": name}, "attrs": {"axis": -1, "ranks": ranks}}
            for name in values
        ]
        gather = {"kind": "collective", "name": "all_gather", "inputs": {"x": "x"}, "attrs": {"axis": -1}}
        return library.reductions({"values": values, "steps": [*steps, gather]})

    found = reductions(3)
    assert {name: launch.constants["unit"] for name, launch in found.items()} == {
        "all_reduce.f16": 1, "all_reduce.f32": 4
    }  # fmt: skip
    assert not reductions(9)
    wide = library.all_reduce("bf16", 4096, 8, 64)
    for architecture in (80, 90, 120):
        for made in build([*found.values(), wide], architecture):
            assert made.overlap == (architecture >= 90)


@pytest.mark.parametrize(
    ("dims", "sizes"),
    [
        ({"T": 8192, "B": 1}, [1, 64, 128, 256, 512, 1024, MANY]),
        ({"T": 8192, "B": 8}, [1, 16, 64, 128, 256, 512, 1024, MANY]),
        ({"T": 8192, "B": 64}, [1, 16, 32, 64, 128, 256, 512, 1024, MANY]),
        ({"T": 100, "B": 2}, [1, 16, 64, 128]),
        ({"T": 16, "B": 4}, [1, 16]),
        ({"B": 2, "S": 40}, [1, 16, 32, 64, 128]),
        ({"B": 1, "S": 20}, [1, 16, 32]),
    ],
)
def test_a_plan_gets_the_sizes_that_it_can_have(dims: dict[str, int], sizes: list[int]) -> None:
    """Few rows are sequences that decode, or an encoder's."""
    assert library.sizes_of({"dims": {name: [1, 1, most] for name, most in dims.items()}}) == sizes


@pytest.mark.parametrize("architecture", [80, 90])
def test_blocks_that_a_multiprocessor_takes_at_most(architecture: int) -> None:
    """Shared memory that nobody uses keeps the next block out (CUDA C++ Programming Guide: 1 KB a block is CUDA's)."""
    (made,) = build([replace(lib.append(attention()), resident=5)], architecture)
    whole = SHARED[architecture] + 1024
    assert 5 * (made.shared + 1024) <= whole < 6 * (made.shared + 1024)


@pytest.mark.parametrize("architecture", set(ARCHITECTURES) - {87, 103, 110, 121})  # of the others' instructions
def test_each_architecture(architecture: int) -> None:
    split, small, large = build(
        [
            lib.decode(attention(), 4),
            lib.append(attention()),
            product(Product(4096, 4096, "f16", "f16", "f16", residual="f16"), 64, architecture),
        ],
        architecture,
    )
    assert split.cubin[:4] == small.cubin[:4] == large.cubin[:4] == b"\x7fELF"
    assert small.threads == 128
    assert split.overlap == small.overlap == large.overlap == (architecture >= 90)
    assert large.shared <= SHARED[architecture]  # the tiles that are best on sm_90 do not fit everywhere


@pytest.mark.parametrize("architecture", [80, 89, 120])
def test_products_of_each_architecture(architecture: int) -> None:
    """One of each kernel in its largest tiles: they must fit the shared memory, E4M3 where it is."""
    sizes = {"outs": 4096, "ins": 4096, "out": "f16", "scale": "f16"}
    kinds = [Product(x="f16", w="i4", group=128, **sizes), Product(x="i8", w="i8", x_scale="row", **sizes)]
    kinds += [Product(x="f8e4m3", w="f8e4m3", x_scale="row", **sizes)] if architecture >= LEAST_FP8 else []
    for made in build([product(p, MANY, architecture) for p in kinds], architecture):
        assert made.cubin[:4] == b"\x7fELF"
        assert made.shared <= SHARED[architecture]


@pytest.mark.parametrize("architecture", [70, 80, 90])
def test_formats_of_each_architecture(architecture: int) -> None:
    """What a chip has no units for too: E4M3 by its bits, E2M1 with scales of E4M3, inputs rounded by rows."""
    sizes = {"outs": 256, "ins": 256, "out": "f16"}
    kinds = [
        Product(x="f16", w="f4e2m1", scale="f8e4m3", group=16, x_scale="tensor", **sizes),
        Product(x="f16", w="f8e4m3", scale="f32", group=128, **sizes),
        Product(x="i8", w="i4", scale="f16", group=128, x_scale="block", x_block=32, **sizes),
        Product(x="f8e4m3", w="f8e4m3", scale="f8e8m0", group=32, x_scale="block", x_block=32, x_scale_type="f8e8m0",
                **sizes),
    ]  # fmt: skip
    least = {"i8": LEAST_INT8, "f8e4m3": LEAST_FP8}
    launches = [product(p, 16, architecture) for p in kinds if architecture >= least.get(p.x, 0)]
    for name in ("nvfp4", "mxfp8"):
        launches += [call.launch for call in program_of(rounding(name), 16, architecture).calls]
    for made in build(launches, architecture):
        assert made.cubin[:4] == b"\x7fELF"


def test_every_feature_compiles() -> None:
    """What the interpreter runs, the compiler may refuse: branches that are not taken are compiled too."""
    plain = attention(dtype="f16", pairs=0)
    every = attention(FEATURES, dtype="bf16", causal=False, pairs=0, dim=80, wide=48, heads=6, groups=2)
    launches = [lib.append(plain), lib.append(attention(style="interleaved", pairs=5)), lib.append(every)]
    launches += [lib.prefill(every), lib.decode(every, 1), lib.decode(every, 4)]
    u8, e4m3 = (replace(every, cache_dtype="u8", codes=codes) for codes in CODES)
    launches += [lib.append(u8), lib.prefill(e4m3), lib.decode(u8, 4)]  # the others in test_each_architecture
    rows = WITHIN.format("bf16", "causal = true, window = 9, softcap = 3.0")
    launches += [call.launch for call in program_of(parse(rows), 64, 90).calls]
    for outs in (1, 6):  # scales and zeros that can't be read in words of 4 bytes: a gate of one number a row
        sizes = {"outs": outs, "ins": 128, "out": "f16", "scale": "f16", "group": 64}
        launches += [product(Product(x="f16", w="u4", zero=True, **sizes), rows, 90) for rows in (1, 64)]
    assert all(made.cubin[:4] == b"\x7fELF" for made in build(launches, 90))


def test_prompts_on_hopper() -> None:
    """The interpreter does not have this kernel: that it is right is shown on the GPU (bench/gpu_kernels.py)."""
    changed: list[dict[str, Any]] = [{"dim": 64, "window": 9}, {"dim": 128, "dtype": "bf16", "prefix": True}]
    wanted = []
    for changes in changed:
        asked = attention(**{"dtype": "f16", "sinks": True} | changes)
        (launch,) = (launch for launch in lib.launches(asked, 90) if launch.name == "prefill")
        assert launch.source == "prefill_hopper.prefill"
        assert launch.constants["rows"] == lib.prefill(asked).constants["rows"]  # one list of tiles for all attentions
        wanted.append(launch)
    for made in build(wanted, 90):
        assert made.threads == 3 * 128
        assert made.overlap
        assert made.shared <= SHARED[90]
        assert "tiles" in made.arguments


def test_codes_of_4_bits_on_hopper() -> None:
    """Nor this one (bench/gpu_products.py); that no weight is moved between threads it asserts when it is compiled."""
    wide = {"outs": 384, "ins": 2304, "scale": "f16", "group": 32}
    kinds: list[dict[str, Any]] = [
        wide | {"x": "f16", "w": "u4", "zero": True, "bias": "f16", "residual": "f16"},
        wide | {"x": "bf16", "w": "f4e2m1", "scale": "f8e8m0"},
        wide | {"x": "f16", "w": "i4", "group": 256},
    ]
    launches = [product(Product(out=one["x"], **one), rows, 90) for one in kinds for rows in (16, 64)]
    assert {launch.source for launch in launches} == {"words_hopper.words"}
    for made in build(launches, 90):
        assert made.overlap
        assert made.shared <= SHARED[90]


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        (80, {}), (100, {}), (90, {"dtype": "f32"}), (90, {"softcap": 30.0}), (90, {"slopes": True}),
        (90, {"codes": "u8"}), (90, {"dim": 80}), (90, {"wide": 64}), (90, {"block": 8}), (90, {"q": (4, 1024, 128)}),
        (90, {"q": (0, 1028, 128)}),
    ],
    ids=str,
)  # fmt: skip
def test_prompts_elsewhere(architecture: int, changes: dict[str, Any]) -> None:
    asked = replace(attention(dtype="f16", dim=128), **{k: v for k, v in changes.items() if k != "codes"})
    asked = replace(asked, codes="u8", cache_dtype="u8") if "codes" in changes else asked
    assert "prefill.prefill" in {launch.source for launch in lib.launches(asked, architecture)}


def test_a_wait_holds_on_every_path() -> None:
    load, wait, store = "ld.global.b32 %r1, [%rd1];\n", "griddepcontrol.wait;\n", "st.global.b32 [%rd2], %r1;\n"
    assert waits(load + wait + store)
    assert not waits(load + store)
    for early in (store, "@%p1 bra $L__BB0_2;\n", "@%p1 ret;\n", "atom.global.add.u32 %r2, [%rd1], 1;\n"):
        with pytest.raises(AssertionError, match="before the wait"):
            waits(load + early + wait)


def test_warps_that_wait_for_others() -> None:
    """Where warps have tasks of their own, those that do not come by the wait halt at a barrier until the others do."""
    branch, wait, others = "@%p1 bra $L__BB0_2;\n", "griddepcontrol.wait;\nbarrier.sync 1;\nret;\n", "$L__BB0_2:\n"
    assert waits(branch + wait + others + "barrier.sync 1;\nst.global.b32 [%rd2], %r1;\n")
    there = "ld.param.b64 %rd1, [prefill_param_0];\nbra.uni $L__BB0_3;\n$L__BB0_3:\n"
    assert waits(branch + wait + others + there + "barrier.sync 1;\n")
    with pytest.raises(AssertionError, match="before the wait"):
        waits(branch + wait + others + "st.global.b32 [%rd2], %r1;\nbarrier.sync 1;\n")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # noqa: ARG005
    check_raises("LOWER-020", build, [lib.append(attention())], 90)
