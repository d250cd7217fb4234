"""Low-bit formats against PyTorch's casts and ml_dtypes, over every value and every midpoint, and their packing."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from compiler.ir.formats import HALF_BYTES, RANGE, from_codes, pack, power_of_two_scale, round_to, spread, unpack
from compiler.ir.interpreter import run
from compiler.ir.parser import parse
from specs.weight_source import E2M1
from tests.golden_errors import check_raises


def probes(values: torch.Tensor) -> torch.Tensor:
    """Every value of a format, every midpoint, and both sides of each midpoint."""
    values = values[torch.isfinite(values)].unique()
    middle = (values[1:] + values[:-1]) / 2
    up, down = (torch.nextafter(middle, torch.full_like(middle, end)) for end in (1e9, -1e9))
    return torch.cat((values, middle, up, down, torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 3))


def test_e4m3_is_torchs_and_ml_dtypes() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = probes(every)
    got = round_to(x, "f8e4m3")
    assert torch.equal(got.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))
    theirs = x.numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(got.view(torch.uint8).numpy(), theirs)


def test_e4m3_saturates_and_keeps_nan() -> None:
    x = torch.tensor([449.0, 1e30, float("inf"), -float("inf"), float("nan")])
    got = round_to(x, "f8e4m3").float()
    assert got[:4].tolist() == [448.0, 448.0, 448.0, -448.0]
    assert got[4].isnan()


def test_e2m1_is_ml_dtypes() -> None:
    x = probes(torch.tensor(E2M1))
    x = torch.cat((x, torch.tensor([6.1, 100.0, -7.0, float("inf"), -0.1])))
    got = round_to(x, "f4e2m1").float().numpy()
    theirs = x.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(got, theirs)
    assert np.array_equal(np.signbit(got), np.signbit(theirs))
    codes = torch.arange(16, dtype=torch.uint8)
    assert np.array_equal(
        from_codes(codes, "f4e2m1").float().numpy(),
        codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32),
    )


@pytest.mark.parametrize("dtype", ["i8", "u8", "i4", "u4"])
def test_integers_round_to_even_and_saturate(dtype: str) -> None:
    low, high = (int(end) for end in RANGE[dtype])
    x = probes(torch.arange(low, high + 1).float())
    assert torch.equal(round_to(x, dtype).float(), torch.from_numpy(np.clip(np.rint(x.numpy()), low, high)))
    ends = round_to(torch.tensor([-1e9, 1e9, float("inf"), float("nan")]), dtype)
    assert ends.tolist() == [low, high, high, 0]


def test_powers_of_two_are_the_microscaling_rule() -> None:
    largest = torch.tensor([6.0, 4.0, 3.9999998, 8.0, 7.9999995, 0.0, 448.0, 2.0**-130])
    got = power_of_two_scale(largest, "f4e2m1").float()
    assert got.tolist() == [1.0, 1.0, 0.5, 2.0, 1.0, 1.0, 64.0, 2.0**-127]
    assert power_of_two_scale(torch.tensor([448.0, 256.0, 255.9]), "f8e4m3").float().tolist() == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("dtype", sorted(HALF_BYTES))
def test_half_bytes_pack_and_unpack(dtype: str) -> None:
    low, high = RANGE[dtype]
    values = round_to(torch.linspace(low, high, 48).reshape(3, 16), dtype)
    packed = pack(values, dtype)
    assert packed.shape == (3, 8)
    assert torch.equal(unpack(packed, dtype).float(), values.float())


def test_a_scale_is_spread_over_ragged_blocks() -> None:
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert spread(scale, (3, 5), (2, 3)).tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 2, 2], [3, 3, 3, 4, 4]]


def test_what_is_no_format() -> None:
    check_raises("IR-004-format", round_to, torch.ones(1), "f16")


NVFP4 = """graph g(%x: f32[2,32], %s: f8e4m3[2,2], %o: f32[1]) {
  %q: f4e2m1[2,32] = quantize(%x, %s, _, %o) {dtype = "f4e2m1", block = (1, 16)}
  %y: f32[2,32] = dequantize(%q, %s, _, %o) {dtype = "f32", block = (1, 16)}
  return y = %y
}"""


def test_two_scales() -> None:
    """NVFP4: blocks of 16 share an E4M3 scale, the tensor a float32 one; against the same arithmetic in ml_dtypes."""
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(1)) * 3
    outer = x.abs().max() / (6 * 448)
    scale = (x.reshape(2, 2, 16).abs().amax(-1) / 6 / outer).to(torch.float8_e4m3fn)
    got = run(parse(NVFP4), {"x": x, "s": scale, "o": outer.reshape(1)}, {}.__getitem__)["y"]
    step = (scale.float() * outer).repeat_interleave(16, 1).numpy()
    wanted = (x.numpy() / step).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * step
    np.testing.assert_array_equal(got.numpy(), wanted)
