"""Choosing tokens and products of few rows, in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compiler.kernels import library
from runtime.sampling import Sampling, candidates, how_words
from tests.conformance.tolerances import tolerance
from tests.kernels.test_attention import run


def test_the_likeliest_token() -> None:
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(1))
    logits[1, [7, 2500]] = 9.0  # equal: the first counts
    logits[2, 2999] = torch.inf
    logits[3, 2100] = torch.nan
    logits[4] = -torch.inf
    tokens = chosen(logits, [Sampling()] * 5, [0.5] * 5)
    expected = np.argmax(logits.numpy(), 1)
    assert tokens == [expected[0], 7, 2999, -1, 0]


def chosen(logits: torch.Tensor, samplings: list[Sampling], chances: list[float]) -> list[int]:
    """What the kernel chooses of each row."""
    rows, vocab = logits.shape
    words = [(*sampling.numbers, chance) for sampling, chance in zip(samplings, chances, strict=True)]
    how = torch.from_numpy(how_words(words))
    tokens = torch.full((rows,), -2, dtype=torch.int32)
    run(library.choose(vocab, "f32"), (rows, 1, 1), {"logits": logits, "how": how, "tokens": tokens})
    return tokens.tolist()


DRAWN = [
    Sampling(temperature=0.7),
    Sampling(top_k=1),
    Sampling(top_k=7),
    Sampling(top_k=5000),
    Sampling(top_p=0.6),
    Sampling(top_p=1e-6),
    Sampling(top_p=0.999),
    Sampling(temperature=1.7, top_k=50, top_p=0.8),
    Sampling(temperature=0.2, top_k=3, top_p=0.99),
    Sampling(),
]


@pytest.mark.parametrize("rounded", [False, True], ids=["", "ties"])
def test_drawn_tokens(rounded: bool) -> None:
    """Each is where the random number falls in what runtime/sampling.py leaves, ties by their ids included."""
    generator = np.random.default_rng(1)
    logits = generator.standard_normal((len(DRAWN), 1100)).astype(np.float32) * 4
    if rounded:
        logits = np.round(logits)  # with both zeros
    for chance in (0.0, 0.4, 1 - 2**-24):
        tokens = chosen(torch.from_numpy(logits), DRAWN, [chance] * len(DRAWN))
        for row, sampling, token in zip(logits, DRAWN, tokens, strict=True):
            if sampling.greedy:
                assert token == row.argmax()
                continue
            ids, weights = candidates(row, sampling)
            (at,) = np.flatnonzero(ids == token)
            ends = np.cumsum(weights, dtype=np.float64)
            ends /= ends[-1]
            # sums of up to 1100 float32 weights, whose powers are the device's: 2^-22 and some roundings each
            assert ends[at] - weights[at] - 1e-5 <= chance <= ends[at] + 1e-5


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
    plain = {"group": 0, "x_kind": "", "x_block": 0, "band": 1, "turned": False, "once": True}
    dense[(-(-outs // 16), 1)](
        x, w, None, None, bias, residual, y, 3, outs=outs, ins=ins, rows=16, tile=16, depth=32, **plain
    )
    expected = x.double() @ w.double().T + bias.double() + residual.double()
    bound = tolerance("matmul", dtype)
    assert ((y.double() - expected).abs() <= bound.absolute * 2 + bound.relative * expected.abs()).all()
