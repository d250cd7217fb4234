"""Rows of a quantized cache: how they round, bit for bit, and what they say back."""

from __future__ import annotations

import pytest
import torch

from compiler.ir.cache_rows import CODES, HEAD, LEAST, from_rows, to_rows
from compiler.ir.interpreter import torch_dtype
from compiler.ir.ops.attention import attention, paged_attention
from tests.conformance.grid import on_grid
from tests.golden_errors import check_raises

# Half a step of the row: u8 has 255 of them between the least and the largest number; E4M3 three bits behind the first
# (arXiv:2209.05433), so at most 2^-4 of the number, and 2^-10 of the scale where it has no first.
HALF_STEP = {"u8": lambda x: (x.amax(-1) - x.amin(-1)) / 510, "f8e4m3": lambda x: x.abs().amax(-1) * 2.0**-4}


@pytest.mark.parametrize("codes", CODES)
def test_a_row_is_off_by_half_a_step_at_most(codes: str) -> None:
    x = torch.randn(50, 3, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 50)[:, None, None]
    x[0, 0] = 0.0
    x[1] += 100.0  # far from 0
    rows = to_rows(x, codes)
    assert (rows.dtype, rows.shape) == (torch.uint8, (50, 3, 24 + HEAD))
    back = from_rows(rows, codes)
    # the zero is rounded too: to a few units of what x / scale is
    room = 1e-6 * x.abs().amax(-1, keepdim=True)
    assert ((back - x).abs() <= HALF_STEP[codes](x)[..., None] * 1.0001 + room).all()
    assert (back[0, 0] == 0).all()


def test_the_layout_is_scale_zero_codes() -> None:
    (row,) = to_rows(torch.tensor([[-1.0, 0.0, 4.1, 0.5]]), "u8")
    scale, zero = row[:HEAD].view(torch.float32).tolist()
    assert scale == pytest.approx(5.1 / 255)
    assert zero == pytest.approx(50.0)
    assert row[HEAD:].tolist() == [0, 50, 255, 75]
    (row,) = to_rows(torch.tensor([[448.0, -1.0, 17.0, 0.001]]) * 2, "f8e4m3")
    assert row[:HEAD].view(torch.float32).tolist() == [2.0, 0.0]
    assert row[HEAD:].view(torch.float8_e4m3fn).tolist() == [448.0, -1.0, 16.0, 0.001953125]  # ties to even


@pytest.mark.parametrize("codes", CODES)
def test_a_row_of_one_number(codes: str) -> None:
    for number in (0.0, 3.0, -7.5):
        back = from_rows(to_rows(torch.full((1, 8), number), codes), codes)
        # a scale where there is no range: u8 finds the number as a multiple of it, in float32
        assert (back - number).abs().max() <= LEAST[codes] / 2 + 2.0**-22 * abs(number)


def test_other_codes() -> None:
    check_raises("IR-004-cache", to_rows, torch.zeros(1, 4), "i4")


@pytest.mark.parametrize("codes", CODES)
def test_attention_is_to_what_the_cache_holds(codes: str) -> None:
    """In two calls as without a cache over numbers that are codes already."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(9, 4, 8, generator=generator)
    k, v = (on_grid((9, 2, 8), codes, generator, exact=True) for _ in range(2))
    caches = [torch.full((3, 2, 4, 8 + HEAD), 255, dtype=torch_dtype("u8")) for _ in range(2)]
    found = []
    for past, new in ((0, 7), (7, 2)):
        part = slice(past, past + new)
        meta = [torch.tensor(x) for x in ([past], [0, new], [2, 0, 1], [0, 3])]
        out = paged_attention(q[part], k[part], v[part], *caches, *meta, None, scale=0.3, causal=True, codes=codes)
        found.append(out)
    wanted = attention(q[None], k[None], v[None], torch.arange(9)[None], scale=0.3, causal=True)
    torch.testing.assert_close(torch.cat(found), wanted[0], atol=1e-5, rtol=1e-5)
