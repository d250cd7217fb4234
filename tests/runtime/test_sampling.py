"""Sampling against transformers' own logits processors: what may be drawn, and how likely it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from runtime.sampling import Sampler, Sampling, candidates

process = pytest.importorskip("transformers.generation.logits_process")

VOCAB = 300
CASES = [
    {"temperature": 0.7},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 1000},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 1.0},
    {"temperature": 1.7, "top_k": 50, "top_p": 0.8},
    {"temperature": 0.3, "top_p": 0.99, "repetition_penalty": 1.3},
    {"temperature": 1.0, "top_k": 5, "repetition_penalty": 0.8},
]


def processors(how: dict[str, float]) -> list[object]:
    """In the order of GenerationMixin._get_logits_processor."""
    found: list[object] = []
    if "repetition_penalty" in how:
        found.append(process.RepetitionPenaltyLogitsProcessor(how["repetition_penalty"]))
    if how.get("temperature", 1.0) != 1.0:
        found.append(process.TemperatureLogitsWarper(how["temperature"]))
    if "top_k" in how:
        found.append(process.TopKLogitsWarper(how["top_k"]))
    if how.get("top_p", 1.0) < 1.0:
        found.append(process.TopPLogitsWarper(how["top_p"]))
    return found


def expected(logits: np.ndarray, prompt: list[int], how: dict[str, float]) -> np.ndarray:
    scores = torch.from_numpy(logits.copy())[None]
    for processor in processors(how):
        scores = processor(torch.tensor([prompt]), scores)  # type: ignore[operator]
    return scores.softmax(dim=-1)[0].numpy()


@pytest.mark.parametrize("how", CASES, ids=str)
def test_probabilities_agree_with_transformers(how: dict[str, float]) -> None:
    for seed in range(5):
        generator = np.random.default_rng(seed)
        logits = (generator.standard_normal(VOCAB) * 4).astype(np.float32)
        prompt = generator.integers(0, VOCAB, 20).tolist()
        want = expected(logits, prompt, how)
        kept = logits.copy()
        sampler = Sampler(Sampling(seed=1, **how), prompt, VOCAB)  # type: ignore[arg-type]
        token = sampler(logits)
        np.testing.assert_array_equal(logits, kept)
        assert want[token] > 0
        if "repetition_penalty" not in how:
            ids, weights = candidates(logits, Sampling(**how))  # type: ignore[arg-type]
            found = np.zeros(VOCAB, np.float32)
            found[ids] = weights
            np.testing.assert_allclose(found, want, atol=1e-6)
            assert ((found > 0) == (want > 0)).all()


def test_ties_with_the_kth_stay() -> None:
    logits = np.array([1, 3, 3, 2, 3], np.float32)
    ids, _ = candidates(logits, Sampling(top_k=2))
    assert ids.tolist() == [1, 2, 4] == np.flatnonzero(expected(logits, [0], {"top_k": 2})).tolist()


def test_the_penalty_counts_prompt_and_new_tokens() -> None:
    logits = np.array([2.0, 1.9, 1.8, -1.0], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=1.1), [0], 4)
    drawn, row = [], [0]
    for _ in range(4):
        drawn.append(sampler(logits))
        assert drawn[-1] == int(expected(logits, row, {"repetition_penalty": 1.1}).argmax())
        row.append(drawn[-1])
    assert drawn[:2] == [1, 0]


def test_frequencies_are_the_probabilities() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=3), [0], 4)
    counts = np.bincount([sampler(logits) for _ in range(20000)], minlength=4) / 20000
    np.testing.assert_allclose(counts, [0.1, 0.2, 0.3, 0.4], atol=0.015)  # 4 standard deviations


def test_seeds() -> None:
    logits = np.zeros(VOCAB, np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [0], VOCAB)
        return [sampler(logits) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)


@pytest.mark.parametrize(
    ("sampling", "greedy"),
    [
        (Sampling(), True),
        (Sampling(seed=3, repetition_penalty=1.2), True),
        (Sampling(temperature=0, top_k=5), True),
        (Sampling(top_k=5), False),
        (Sampling(top_p=0.5), False),
        (Sampling(temperature=1), False),
    ],
)
def test_what_is_greedy(sampling: Sampling, greedy: bool) -> None:
    assert sampling.greedy is greedy
