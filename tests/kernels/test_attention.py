"""The attention kernels in Triton's interpreter against the operation's own body: every feature, mixed batches."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from compiler.ir.cache_rows import CODES
from compiler.kernels import attention as lib
from compiler.kernels.build import load
from tests.conformance.tolerances import tolerance
from tests.kernels.cases import FEATURES, SEQUENCES, Case, attention
from tests.kernels.interpreted import kernel


def run(launch: lib.Launch, grid: tuple[int, int, int], values: dict[str, Any]) -> None:
    """Launch a kernel in the interpreter."""
    kernel(launch)[grid](*(values[name] if kind else None for name, kind in launch.arguments), **launch.constants)


def check(a: lib.Attention, sequences: list[tuple[int, int]] = SEQUENCES, splits: int = 1) -> None:
    case = Case(a, sequences)
    expected = case.expected().double()
    launches, values = case.launches(splits)
    for launch, grid in launches:
        run(launch, grid, values)
    compare(expected, values["out"].double(), a.dtype)
    assert not values.get("ended", torch.zeros(1)).any()  # the next launch counts from nothing
    for wanted, found in zip(case.wanted, (case.k_cache, case.v_cache), strict=True):
        torch.testing.assert_close(found, wanted, equal_nan=True)


def compare(expected: torch.Tensor, got: torch.Tensor, dtype: str) -> None:
    bound = tolerance("paged_attention", dtype)
    difference = (got - expected).abs()
    excess = difference - bound.absolute - bound.relative * expected.abs()
    assert excess.max() <= 0, f"off by {difference.max():.3g}, tolerance {bound}"


# all pairs: each kernel treats each feature in one place, and two can only meet in the mask or the running maximum
COMBINATIONS = [names for size in (0, 1, 2, len(FEATURES)) for names in combinations(FEATURES, size)]


@pytest.mark.parametrize("features", COMBINATIONS, ids=lambda names: "+".join(names) or "plain")
def test_features(features: tuple[str, ...]) -> None:
    check(attention(features), splits=4)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("features", [(), FEATURES], ids=["plain", "all"])
def test_types(features: tuple[str, ...], dtype: str) -> None:
    check(attention(features, dtype=dtype), splits=4)


@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (6, 2), (20, 1)])
def test_heads(heads: int, groups: int) -> None:
    check(attention(heads=heads, groups=groups))


@pytest.mark.parametrize("dim", [8, 80, 256])
def test_head_sizes(dim: int) -> None:
    check(attention(dim=dim, pairs=dim // 2))


@pytest.mark.parametrize("splits", [1, 4, 16])
def test_splits(splits: int) -> None:
    check(attention(("sinks",)), [(past, 1) for past in (0, 5, 100)], splits)


def test_splits_are_joined_in_order_whichever_ends_last() -> None:
    """With splits that ended before in another order: the same bits, and the counter is back at nothing."""
    case = Case(attention(("sinks",)), [(past, 1) for past in (60, 64, 100)])  # keys for all four
    found = []
    for first in (0, 1, 2, 3):
        ((launch, grid),), values = case.launches(4)
        kernel = load(launch)
        arguments = [values[name] if kind else None for name, kind in launch.arguments]
        kernel[grid](*arguments, **launch.constants)
        before = values["out"].clone()
        values["out"].fill_(torch.nan)
        # all but one have ended: whoever comes now is the last, and finds what the others left
        values["ended"].fill_(3 - first)
        kernel[(*grid[:2], first + 1)](*arguments, **launch.constants)
        assert torch.equal(values["out"], before)
        assert not values["ended"].any()
        found.append(before)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("features", [(), ("window",), ("slopes", "sinks")], ids="+".join)
def test_values_of_another_size_than_keys(features: tuple[str, ...]) -> None:
    check(attention(features, dim=48, wide=32, pairs=8))


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("pairs", [0, 6])
def test_rotary(style: str, pairs: int) -> None:
    check(attention(style=style, pairs=pairs), [(5, 1), (0, 3)])


def test_keys_seen_from_both_sides() -> None:
    check(attention(causal=False))
    check(attention(("window",), causal=False))


@pytest.mark.parametrize("window", [1, 16, 33])
def test_windows_at_the_edges_of_tiles(window: int) -> None:
    check(attention(window=window), [(47, 1), (0, 40), (31, 34)])


def test_a_cache_of_another_type() -> None:
    check(attention(dtype="f32", cache_dtype="f16"), splits=4)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_linear_biases_rounded_to_bfloat16(dtype: str) -> None:
    """From position 256 on neighbouring keys get one bias, which float32 would tell apart by up to half the slope."""
    sequences = [(271, 1), (3, 1), (60, 4)]
    check(attention(("slopes",), dtype=dtype, bf16_bias=0.05), sequences, splits=4)
    check(attention(("slopes", "prefix", "window"), dtype=dtype, bf16_bias=0.05), [(270, 4)])
    case, other = Case(attention(("slopes",), bf16_bias=0.05), sequences), Case(attention(("slopes",)), sequences)
    launches, values = other.launches(1)
    for launch, grid in launches:
        run(launch, grid, values | {"slopes": 0.05 * values["slopes"]})
    with pytest.raises(AssertionError, match="off by"):  # the rounding can be seen
        compare(case.expected().double(), values["out"].double(), "f32")


# -- 8-bit caches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("features", [(), *((name,) for name in FEATURES), FEATURES], ids="+".join)
def test_features_over_codes(features: tuple[str, ...], codes: str) -> None:
    check(attention(features, codes=codes), [(20, 1), (17, 5)], splits=4)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_types_over_codes(dtype: str, codes: str) -> None:
    # not rotated: the interpreter's cast to bfloat16 truncates, and codes of what it rotated would be others
    check(attention(("window", "sinks"), dtype=dtype, codes=codes, pairs=0), [(20, 1), (17, 5)], splits=4)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize(
    "changes",
    [
        {"heads": 3, "groups": 3},
        {"heads": 20, "groups": 1},
        {"dim": 80, "pairs": 40},
        {"dim": 48, "wide": 32, "pairs": 8},
        {"pairs": 0},
        {"style": "interleaved", "pairs": 6},
    ],
    ids=str,
)
def test_shapes_over_codes(changes: dict[str, Any], codes: str) -> None:
    check(attention(codes=codes, **changes), [(20, 1), (0, 3)])


@pytest.mark.parametrize("codes", CODES)
def test_codes_are_rounded_as_the_rows_of_the_ir(codes: str) -> None:
    """Every code, numbers between two of them, ties, and rows of one number, by the kernel's own arithmetic."""
    x = torch.randn(64, 4 * 32) * torch.logspace(-4, 4, 64)[:, None]
    x[:8] = torch.arange(8 * 128).reshape(8, 128) / 2.0 - 100
    x[8], x[9] = 0.0, 7.5
    case = Case(attention(heads=2, groups=2, codes=codes, pairs=0), [(0, 64)])
    case.row[:, 64:] = x
    case.expected()
    launches, values = case.launches(1)
    run(*launches[0], values)
    for wanted, found in zip(case.wanted, (case.k_cache, case.v_cache), strict=True):
        assert torch.equal(wanted, found)
