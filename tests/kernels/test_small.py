"""Choosing tokens and products of few rows, in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compiler.kernels import library
from tests.conformance.tolerances import tolerance
from tests.kernels.test_attention import run


def test_the_likeliest_token() -> None:
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(1))
    logits[1, [7, 2500]] = 9.0  # equal: the first counts
    logits[2, 2999] = torch.inf
    logits[3, 2100] = torch.nan
    logits[4] = -torch.inf
    tokens = torch.full((5,), -2, dtype=torch.int32)
    run(library.choose(3000, "f32"), (5, 1, 1), {"logits": logits, "tokens": tokens})
    expected = np.argmax(logits.numpy(), 1)
    assert tokens.tolist() == [expected[0], 7, 2999, -1, 0]


def test_tokens_for_the_next_step() -> None:
    chosen = torch.tensor([7, -1, 5], dtype=torch.int32)
    sources = torch.tensor([2, -1, 1, 0] * 40, dtype=torch.int32)
    tokens = torch.full((170,), 9, dtype=torch.int32)
    values = {"chosen": chosen, "sources": sources, "tokens": tokens, "count": 160}
    run(library.carry(), (2, 1, 1), values)
    assert tokens.tolist() == [5, 9, 0, 7] * 40 + [9] * 10


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize(("outs", "ins"), [(48, 64), (40, 72)])
def test_few_rows(dtype: str, outs: int, ins: int) -> None:
    from compiler.kernels.dense import dense

    kind = {"f32": torch.float32, "f16": torch.float16}[dtype]
    generator = torch.Generator().manual_seed(2)
    x, w, bias, residual = (
        torch.randn(*shape, generator=generator).to(kind) for shape in ((3, ins), (outs, ins), (outs,), (3, outs))
    )
    y = torch.full((3, outs), torch.nan, dtype=kind)
    plain = {"group": 0, "x_kind": "", "x_block": 0, "band": 1, "turned": False}
    dense[(-(-outs // 16), 1)](
        x, w, None, None, bias, residual, y, 3, outs=outs, ins=ins, rows=16, tile=16, depth=32, **plain
    )
    expected = x.double() @ w.double().T + bias.double() + residual.double()
    bound = tolerance("matmul", dtype)
    assert ((y.double() - expected).abs() <= bound.absolute * 2 + bound.relative * expected.abs()).all()
