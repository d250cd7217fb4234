"""Products of every stored type in Triton's interpreter against dequantize and matmul of the IR; refusals; packing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from compiler.ir.formats import RANGE, round_to
from compiler.ir.interpreter import torch_dtype
from compiler.ir.ops.quantize import dequantize
from compiler.kernels.attention import Launch
from compiler.kernels.products import MANY, Product, in_words, joined, pack, packed_bytes, product, unpack
from compiler.kernels.row_source import RefusedError
from tests.kernels.test_attention import run

OUTS, INS, COUNT = 40, 256, 3


def inputs(p: Product, count: int) -> tuple[dict[str, torch.Tensor | int], torch.Tensor, torch.Tensor]:
    """What a launch takes, the exact result in float64, and the sum of its terms' sizes."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def coded(dtype: str, *shape: int) -> torch.Tensor:
        if dtype not in RANGE:
            return random(*shape).to(torch_dtype(dtype))
        low, high = RANGE[dtype]
        return round_to(torch.rand(*shape, generator=generator) * (high - low) + low, dtype)

    def scales(of: str, dtype: str, *shape: int) -> torch.Tensor:
        """What brings codes to about 1."""
        exponents = torch.randint(-3, 2, shape, generator=generator) - math.frexp(RANGE[of][1])[1]
        if dtype == "f8e8m0":
            return (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        return ((torch.rand(*shape, generator=generator) + 0.5) * torch.exp2(exponents)).to(torch_dtype(dtype))

    values: dict[str, torch.Tensor | int] = {"count": count}
    w, x = coded(p.w, p.outs, p.ins), coded(p.x, count, p.ins)
    groups = p.ins // p.group if p.group else 1
    block, wide_w, wide_x = (1, p.group or p.ins), w.double(), x.double()
    if p.scale:
        scale = scales(p.w, p.scale, p.outs, groups)
        zero = coded(p.w, p.outs, groups) if p.zero else None
        wide_w = dequantize(w, scale, zero, dtype="f32", block=block).double()
        values["scale"] = (scale.view(torch.uint8) if p.scale.startswith("f8") else scale).T.contiguous()
        if zero is not None:
            values["zero"] = zero.T.contiguous()
    if p.x_scale:
        shape = {"tensor": (1, 1), "row": (count, 1), "block": (count, p.ins // (p.x_block or 1))}[p.x_scale]
        x_scale = scales(p.x, p.x_scale_type, *shape) if p.x in RANGE else torch.tensor([[0.0375]])
        blocks = {"tensor": (), "row": (), "block": (1, p.x_block)}[p.x_scale]
        wide_x = dequantize(x, x_scale, dtype="f32", block=blocks).double() if p.x in RANGE else wide_x * 0.0375
        values["x_scale"] = x_scale.view(torch.uint8) if p.x_scale_type == "f8e8m0" else x_scale
    exact, size = wide_x @ wide_w.T, wide_x.abs() @ wide_w.abs().T
    for name, dtype, shape in (("bias", p.bias, (p.outs,)), ("residual", p.residual, (count, p.outs))):
        if dtype:
            values[name] = random(*shape).to(torch_dtype(dtype))
            exact = exact + values[name].double()  # type: ignore[union-attr]
    values |= {"x": x, "w": pack(w, p.w) if in_words(p.x, p.w, p.group) else w}
    return values, exact, size


def grid_of(launch: Launch, p: Product, count: int) -> tuple[int, int, int]:
    constants = launch.constants
    splits = constants["splits"] if launch.name in ("widened", "words") else 1
    return -(-p.outs // constants["tile"]), -(-count // constants["rows"]), splits


def check(p: Product, rows: int = 16, count: int = COUNT) -> None:
    launch = product(p, rows, 90)
    values, exact, size = inputs(p, count)
    y = torch.full((count, p.outs), torch.nan, dtype=torch_dtype(p.out))
    splits = launch.constants.get("splits", 1)
    made = torch.full((splits, count, p.outs), torch.nan) if splits > 1 else y
    run(launch, grid_of(launch, p, count), values | {"y": made})
    if splits > 1:
        join = joined(p, splits)
        run(join, grid_of(join, p, count), values | {"sums": made, "y": y})
    # Higham 3.1: a sum of n terms in float32 is off by n u |x||w|; scales and sums add a rounding each. The last
    # is half a unit in the last place, 2^-11 in f16; for bf16 the interpreter cuts off: a whole unit, 2^-7
    last = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-7}[p.out]
    bound = (p.ins + 4) * 2.0**-24 * (size + exact.abs()) + last * exact.abs()
    if (
        launch.name in ("widened", "words") and p.group
    ):  # `dequantize` rounds each weight to the type of x, and so does the kernel
        bound += {"f16": 2.0**-11, "bf16": 2.0**-7}[p.x] * size
    assert ((y.double() - exact).abs() <= bound).all()


W4 = Product(OUTS, INS, "f16", "i4", "f16", scale="f16", group=128)
KINDS = {
    "f16": Product(OUTS, INS, "f16", "f16", "f16"),
    "bf16": Product(OUTS, INS, "bf16", "bf16", "bf16", bias="bf16", residual="bf16"),
    "f16 to f32": Product(OUTS, INS, "f16", "f16", "f32", residual="f16"),
    "w8a16": Product(OUTS, INS, "f16", "i8", "f16", scale="f32", bias="f16"),
    "w8a16 bf16": Product(OUTS, INS, "bf16", "i8", "bf16", scale="f32", residual="bf16"),
    "w8a16 groups": Product(OUTS, INS, "f16", "i8", "f16", scale="f16", group=64),
    "w8a16 32": Product(OUTS, INS, "f16", "i8", "f16", scale="f16", group=32),
    "fp8 weights": Product(OUTS, INS, "f16", "f8e4m3", "f16", scale="f32"),
    "fp8 weights bf16": Product(OUTS, INS, "bf16", "f8e4m3", "bf16", scale="f32"),
    "w8a8": Product(OUTS, INS, "i8", "i8", "f16", scale="f32", x_scale="row", bias="f16", residual="f16"),
    "w8a8 tensor": Product(OUTS, INS, "i8", "i8", "bf16", scale="f32", x_scale="tensor"),
    "w8a8 blocks": Product(OUTS, INS, "i8", "i8", "f16", scale="f32", x_scale="block", x_block=32),
    "fp8": Product(OUTS, INS, "f8e4m3", "f8e4m3", "f16", scale="f32", x_scale="tensor", residual="f16"),
    "fp8 rows": Product(OUTS, INS, "f8e4m3", "f8e4m3", "bf16", scale="f32", x_scale="row"),
    "mxfp8": Product(OUTS, INS, "f8e4m3", "f8e4m3", "f16", scale="f8e8m0", group=32, x_scale="block", x_block=32,
                     x_scale_type="f8e8m0"),
    "w4a16": W4,
    "w4a16 bf16": replace(W4, x="bf16", out="bf16", scale="bf16", bias="bf16", residual="bf16"),
    "w4a16 32": replace(W4, group=32),
    "w4a16 64": replace(W4, group=64, scale="f32", residual="f16"),
    "w4a16 256": replace(W4, group=256),
    "w4a16 rows": replace(W4, group=0),
    "w4a16 zero": replace(W4, w="u4", zero=True, group=64),
    "w4a16 signed zero": replace(W4, zero=True),
    "w4a16 zero of rows": replace(W4, w="u4", zero=True, group=0),
    "w4a16 unsigned": replace(W4, w="u4", zero=False),
    "mxfp4": replace(W4, w="f4e2m1", scale="f8e8m0", group=32),
    "mxfp4 bf16": replace(W4, x="bf16", out="bf16", w="f4e2m1", scale="f8e8m0", group=32),
    "nvfp4": replace(W4, w="f4e2m1", scale="f8e4m3", group=16, x_scale="tensor"),
    "nvfp4 bf16": replace(W4, x="bf16", out="bf16", w="f4e2m1", scale="f8e4m3", group=16, x_scale="tensor"),
    "w4a8": replace(W4, x="i8", x_scale="block", x_block=32),
    "w4a8 zero": replace(W4, x="i8", w="u4", zero=True, x_scale="row"),
}  # fmt: skip
HOPPERS = ("w4a16", "w4a16 bf16", "w4a16 32", "w4a16 256", "w4a16 zero", "w4a16 signed zero", "w4a16 unsigned",
           "mxfp4 bf16")  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name: str) -> None:
    check(KINDS[name])


@pytest.mark.parametrize(
    "name", ["f16", "w8a16", "w8a8", "fp8", "w4a16 bf16", "w4a16 32", "w4a16 zero", "mxfp4", "nvfp4"]
)
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (64, 50), (256, 150), (MANY, 150)])
def test_more_rows(name: str, rows: int, count: int) -> None:
    check(KINDS[name], rows, count)


def test_a_scale_of_the_whole_weight_at_many_rows() -> None:
    check(replace(W4, x_scale="tensor"), 64, 5)


def test_columns_are_split_where_blocks_would_be_few() -> None:
    splits = {rows: product(replace(W4, outs=4096, ins=4096), rows, 90).constants["splits"] for rows in (16, 64, MANY)}
    assert splits == {16: 4, 64: 8, MANY: 1}
    assert product(W4, 64, 90).constants["splits"] == 2  # as many as there are spans


@pytest.mark.parametrize("name", KINDS)
def test_codes_of_4_bits_have_a_kernel_on_hopper(name: str) -> None:
    """At 2 to 64 rows, where scales are of the type of x and tiles are whole; elsewhere the portable one."""
    p, hopper = replace(KINDS[name], outs=256), "words_hopper.words"
    suits = name in HOPPERS
    assert [product(p, rows, 90).source == hopper for rows in (1, 16, 64, 128, 256)] == [
        False,
        suits,
        suits,
        False,
        False,
    ]
    assert product(p, 16, 100).source != hopper
    assert product(replace(p, outs=200), 16, 90).source != hopper


@pytest.mark.parametrize("name", HOPPERS)
@pytest.mark.parametrize(("rows", "count"), [(16, 3), (64, 50)])
def test_its_arguments_and_constants_are_those_of_the_portable_kernel(name: str, rows: int, count: int) -> None:
    """Which the interpreter runs in its place: tiles, splits, and what joins them."""
    check(replace(KINDS[name], outs=256, ins=1280), rows, count)


def test_tiles_on_hopper() -> None:
    """Of the measured shapes of a layer: tile and splits."""
    shapes = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))
    asked = [replace(W4, outs=outs, ins=ins) for outs, ins in shapes]

    def tiles(**changes: object) -> list[tuple[int, int]]:
        made = [product(replace(p, **changes), rows, 90).constants for p in asked]  # type: ignore[arg-type]
        return [(one["tile"], one["splits"]) for one in made]

    rows = 16
    assert tiles() == [(64, 2), (64, 4), (64, 1), (64, 4)]
    assert tiles(w="u4", zero=True) == [(128, 4), (128, 8), (128, 2), (128, 8)]
    rows = 64
    assert tiles() == [(128, 2), (128, 8), (128, 1), (128, 8)]
    wide = [product(p, 128, 90).source for p in asked]
    assert wide == ["widened.widened", "widened.widened", "words_hopper.words", "widened.widened"]


@pytest.mark.parametrize("name", ["f16", "fp8", "w4a16"])
def test_blocks_of_few_rows_are_spread_evenly(name: str) -> None:
    """As many on each multiprocessor; the weight, which nobody reads again, makes room in the L2 cache first."""
    asked = replace(KINDS[name], outs=12288, ins=4096)
    one, many = product(asked, 1, 90), product(asked, 512, 90)
    assert one.resident == math.ceil(12288 / one.constants["tile"] / 132)
    assert (one.constants["once"], many.constants["once"], many.resident) == (True, False, 0)


@pytest.mark.parametrize("name", ["f16", "w8a16", "w8a8", "w4a16 rows", "w4a8 zero"])
def test_widths_that_no_tile_divides(name: str) -> None:
    group = {"group": 0} if KINDS[name].group else {}
    check(replace(KINDS[name], ins=96, **group))
    check(replace(KINDS[name], ins=200, **group), 64, 5)


@pytest.mark.parametrize("dtype", ["i4", "u4", "f4e2m1", "i8"])
@pytest.mark.parametrize("ins", [128, 256, 48, 130])
def test_packing_is_undone(dtype: str, ins: int) -> None:
    low, high = RANGE[dtype]
    values = round_to(torch.rand(6, ins, generator=torch.Generator().manual_seed(1)) * (high - low) + low, dtype)
    stored = pack(values, dtype)
    assert stored.shape == (6, packed_bytes(ins, dtype))
    assert torch.equal(unpack(stored, ins, dtype).float(), values.float())


def test_where_codes_lie() -> None:
    """The layout is part of bundles: by its definition, not by its inverse."""
    values = torch.arange(128, dtype=torch.uint8).reshape(1, 128) % 16
    words = pack(values, "u4").view(torch.uint16).to(torch.int64)[0]
    for column in range(128):
        assert words[column % 32] >> 4 * (column // 32) & 15 == column % 16
    words = pack((values.to(torch.int8) - 8), "i8").view(torch.uint16).to(torch.int64)[0]
    for column in range(128):
        assert words[column % 64] >> 8 * (column // 64) & 255 == (column % 16 - 8) % 256


@pytest.mark.parametrize(
    ("p", "architecture", "why"),
    [
        (replace(W4, x="f8e4m3"), 90, "f8e4m3 and i4"),
        (KINDS["fp8"], 80, "f8e4m3 on sm_80"),
        (KINDS["w8a8"], 75, "i8 on sm_75"),
        (replace(W4, group=48), 90, "48 of 256 columns"),
        (replace(W4, group=16), 90, "16 of 256 columns"),
        (replace(W4, scale=""), 90, "without a scale"),
        (replace(W4, scale="f8e4m3"), 90, "scales of f8e4m3"),
        (replace(KINDS["nvfp4"], group=32), 90, "scales of f8e4m3"),
        (replace(W4, w="f4e2m1", zero=True), 90, "a zero of f4e2m1"),
        (replace(W4, x_scale="row"), 90, "a scale of f16"),
        (replace(KINDS["w8a8"], x_scale="block"), 90, "blocks of 0"),
    ],
)
def test_what_has_no_kernel_is_refused(p: Product, architecture: int, why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        product(p, 16, architecture)
