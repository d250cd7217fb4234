"""Errors and agreements against values worked out by hand or by PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compiler.validate.metrics import agreement, error, log_softmax, perplexity


def test_error_of_a_known_pair() -> None:
    found = error(np.array([3.0, 4.0]), np.array([3.0, 0.0]))
    assert (found.max_abs, found.relative) == (4.0, 4.0 / 3.0)
    assert found.cosine_distance == pytest.approx(1 - 9 / (3 * 5))


def test_error_of_equal_empty_and_broken_values() -> None:
    same = np.arange(6.0).reshape(2, 3)
    assert error(same, same).max_abs == error(same, same).relative == 0
    assert error(np.zeros(0), np.zeros(0)).relative == 0
    assert error(np.zeros(2), np.zeros(2)).relative == 0
    assert error(np.ones(2), np.zeros(2)).relative == math.inf
    assert math.isnan(error(np.array([math.nan]), np.array([1.0])).relative)
    with pytest.raises(ValueError, match="shapes"):
        error(np.zeros(2), np.zeros(3))


def test_agreement_is_what_pytorch_computes() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = [torch.randn(length, 11, generator=generator) for length in (4, 7)]
    found = [logits + 0.3 * torch.randn(logits.shape, generator=generator) for logits in reference]
    got = agreement([x.numpy() for x in found], [x.numpy() for x in reference])
    p, q = (torch.cat(x).double().log_softmax(-1) for x in (reference, found))
    assert got.mean_kl == pytest.approx(float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")))
    assert got.top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    sets = [len(set(a) & set(b)) / 5 for a, b in zip(p.topk(5)[1].tolist(), q.topk(5)[1].tolist(), strict=True)]
    assert got.top5 == pytest.approx(sum(sets) / len(sets))
    assert got.perplexity is None


def test_perplexity_of_uniform_predictions_is_the_vocabulary() -> None:
    assert perplexity([np.zeros((5, 32), np.float32)], [[1, 2, 3, 4, 5]]) == pytest.approx(32)
    assert math.isnan(perplexity([np.zeros((1, 32), np.float32)], [[1]]))


def test_perplexity_of_text() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)
    ids = [3, 1, 4, 1, 5, 2]
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits[:-1]), torch.tensor(ids[1:]))
    assert perplexity([logits], [ids]) == pytest.approx(math.exp(float(loss)), rel=1e-6)


def test_log_softmax_of_huge_logits_is_finite() -> None:
    assert np.isfinite(log_softmax(np.array([[1e30, 0.0, -1e30]]))).all()
