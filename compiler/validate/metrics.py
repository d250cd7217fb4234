"""How far numbers are from the reference's: errors of any value, and what they do to a model's predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Error:
    """Of a value against the reference: greatest absolute, relative ||x - r|| / ||r||, and 1 - cosine of the angle."""

    max_abs: float
    relative: float
    cosine_distance: float


def error(found: Floats, reference: Floats) -> Error:
    """Errors of an array of any shape; NaN where the two are not both finite. Raises ValueError for unequal shapes."""
    if found.shape != reference.shape:
        raise ValueError(f"shapes {found.shape} and {reference.shape}")
    x, r = found.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    if not (np.isfinite(x).all() and np.isfinite(r).all()):
        return Error(math.nan, math.nan, math.nan)
    if not x.size:
        return Error(0.0, 0.0, 0.0)
    gap, norm = float(np.linalg.norm(x - r)), float(np.linalg.norm(r))
    lengths = norm * float(np.linalg.norm(x))
    relative = gap / norm if norm else (0.0 if not gap else math.inf)
    return Error(float(np.abs(x - r).max()), relative, 1.0 - float(x @ r) / lengths if lengths else relative)


@dataclass(frozen=True)
class Agreement:
    """Of logits with the reference's: errors, mean KL divergence in nats, shares of equal first and equal top-5 sets.

    `top5` is the mean share of the reference's five likeliest that are among ours; `perplexity` is null where the next
    tokens are not text that the model should predict.
    """

    max_abs: float
    relative: float
    cosine_distance: float
    mean_kl: float
    top1: float
    top5: float
    perplexity: float | None = None
    reference_perplexity: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        """The content of a report's `numbers`."""
        return asdict(self)


def agreement(
    found: Sequence[Floats], reference: Sequence[Floats], tokens: Sequence[Sequence[int]] | None = None
) -> Agreement:
    """Compare logits [len, V] row by row; with `tokens`, the rows' own ids, also perplexity of the next token."""
    ours, theirs = np.concatenate(found), np.concatenate(reference)
    whole = error(ours, theirs)
    p, q = log_softmax(theirs), log_softmax(ours)
    count = min(5, theirs.shape[-1])
    top_ours, top_theirs = (np.argsort(-x, axis=-1, kind="stable")[:, :count] for x in (ours, theirs))
    shared = [len(np.intersect1d(a, b)) for a, b in zip(top_ours, top_theirs, strict=True)]
    return Agreement(
        max_abs=whole.max_abs,
        relative=whole.relative,
        cosine_distance=whole.cosine_distance,
        mean_kl=float((np.exp(p) * (p - q)).sum(-1).mean()),
        top1=float((top_ours[:, 0] == top_theirs[:, 0]).mean()),
        top5=float(np.mean(shared)) / count,
        perplexity=None if tokens is None else perplexity(found, tokens),
        reference_perplexity=None if tokens is None else perplexity(reference, tokens),
    )


def perplexity(logits: Sequence[Floats], tokens: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-likelihood of each next token of the rows; NaN where no row has two tokens."""
    losses = [
        -log_softmax(row[:-1])[np.arange(len(ids) - 1), np.asarray(ids[1:])]
        for row, ids in zip(logits, tokens, strict=True)
        if len(ids) > 1
    ]
    return math.exp(float(np.concatenate(losses).mean())) if losses else math.nan


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """Logarithms of the probabilities along the last axis, in float64."""
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return result
