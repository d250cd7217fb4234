"""Beams in the engine, over a real paged cache: the same as each prompt's search alone over a model without a cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.beam_request import BeamRequest
from runtime.beam_search import Beams, BeamSearch, Hypothesis
from runtime.engine import Engine
from runtime.sampling import Sampling
from tests.golden_errors import check_raises
from tests.runtime.fake import VOCAB, Behind, FakeExecutable, Picking, decoder, dense_greedy, dense_logits

STOP = (3, 17, 29)


def searched(prompt: list[int], beams: Beams, new: int, stop: tuple[int, ...] = ()) -> list[Hypothesis]:
    """The search with every sequence computed from its first token."""
    search = BeamSearch(beams, prompt, max_new_tokens=new, stop=stop)
    rows = [prompt]
    while chosen := search.advance(np.stack([dense_logits(row)[-1] for row in rows])):
        if len(rows) == 1:
            rows *= beams.num_beams
        rows = [[*rows[parent], token] for parent, token in chosen]
    return search.best()


def same(found: list[Hypothesis], expected: list[Hypothesis]) -> None:
    assert [one.ids for one in found] == [one.ids for one in expected]
    assert [one.finish for one in found] == [one.finish for one in expected]
    np.testing.assert_allclose([one.score for one in found], [one.score for one in expected], rtol=1e-5)


def finish(engine: Engine) -> None:
    for _ in range(2000):
        if not engine.busy:
            return
        engine.step()
    raise AssertionError("it does not end")


def prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCAB, length).tolist() for length in lengths]


@pytest.mark.parametrize("step_tokens", [None, 5])
@pytest.mark.parametrize("count", [2, 4])
def test_beams_are_those_of_a_search_without_a_cache(count: int, step_tokens: int | None) -> None:
    model, executable = decoder(step_tokens=step_tokens)
    rows = [[1, 2, 3], [4], list(range(5, 30)), [7] * 8]
    found = model.search(rows, num_beams=count, num_return_sequences=count, max_new_tokens=12, stop=STOP)
    for row, one in zip(rows, found, strict=True):
        same(one, searched(row, Beams(count, num_return_sequences=count), 12, STOP))
    assert model.generate(rows, num_beams=count, max_new_tokens=12, stop=STOP) == [one[0].ids for one in found]
    assert model.engine.free_blocks == 64
    assert executable.shared > 0
    assert executable.copied > 0


def test_a_prompt_is_computed_once_and_its_blocks_are_shared() -> None:
    model, executable = decoder()
    model.search([list(range(16))], num_beams=4, max_new_tokens=9)
    assert executable.shapes == [(1, 16)] + [(4, 4)] * 8
    assert executable.shared >= 3 * 4  # four full blocks of the prompt, of which four beams have three copies less


def test_beams_share_steps_with_others() -> None:
    executable = FakeExecutable(64)
    engine = Engine(executable, max_batch=5, max_sequence=64, vocab=VOCAB)
    plain = engine.submit([1, 2, 3], max_new_tokens=20)
    drawn = engine.submit([4, 5], Sampling(temperature=0.8, seed=1), max_new_tokens=4)
    beams = engine.submit_beams([7, 8, 9], Beams(3), max_new_tokens=10)
    late = engine.submit([9], max_new_tokens=3)
    logits = engine.submit_logits([5, 6, 7])
    finish(engine)
    assert (4, 4) in executable.shapes or (5, 5) in executable.shapes
    assert plain.new == dense_greedy([1, 2, 3], 20)
    assert late.new == dense_greedy([9], 3)
    assert len(drawn.new) == 4
    np.testing.assert_allclose(logits.logits, dense_logits([5, 6, 7]), atol=1e-5)
    same(beams.found, searched([7, 8, 9], Beams(3), 10))
    assert beams.finish == "beams"


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    kinds=st.lists(st.integers(1, 4), min_size=6, max_size=6),
    new=st.integers(1, 14),
    blocks=st.integers(32, 60),
    early=st.sampled_from([True, False, "never"]),
    penalty=st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
    cancelled=st.integers(-1, 5),
    device=st.sampled_from([FakeExecutable, Picking, Behind, partial(Behind, stages=2), partial(Behind, stages=4)]),
    seed=st.integers(0, 1 << 16),
)
def test_any_mix(
    lengths: list[int], kinds: list[int], new: int, blocks: int, early: Any, penalty: float, cancelled: int,
    device: Any, seed: int,
) -> None:  # fmt: skip
    """Nothing leaks, and the fake cache sees that nothing shared is written; logits are wanted in between."""
    engine = Engine(device(blocks), max_batch=4, max_sequence=64, vocab=VOCAB, step_tokens=6)
    rows = prompts(seed, lengths)
    requests: list[Any] = []
    for row, count in zip(rows, kinds, strict=False):
        beams = Beams(count, penalty, early)
        submit = engine.submit if count == 1 else lambda row, beams=beams, **how: engine.submit_beams(row, beams, **how)
        requests.append(submit(row, max_new_tokens=new, stop=STOP))
    read = engine.submit_logits(rows[0])
    for _ in range(seed % 9):
        engine.step()
    if cancelled < len(requests) and cancelled >= 0:
        engine.cancel(requests[cancelled])
    finish(engine)
    assert engine.free_blocks == blocks
    assert not any(engine._schedule.allocator._users)
    assert np.allclose(read.logits, dense_logits(rows[0]), atol=1e-4)
    for place, (row, count, request) in enumerate(zip(rows, kinds, requests, strict=False)):
        if request.finish == "cancelled":
            assert place == cancelled
        elif isinstance(request, BeamRequest):
            same(request.found, searched(row, Beams(count, penalty, early), new, STOP))
        else:
            ids = dense_greedy(row, new)
            end = next((at + 1 for at, token in enumerate(ids) if token in STOP), new)
            assert request.new == ids[:end]


def test_others_give_way_to_beams_and_beams_to_nobody() -> None:
    engine = Engine(FakeExecutable(18), max_batch=4, max_sequence=64, vocab=VOCAB)
    plain = [engine.submit(row, max_new_tokens=40) for row in prompts(3, [8, 8])]
    beams = engine.submit_beams([1, 2, 3], Beams(2), max_new_tokens=16)
    finish(engine)
    assert engine.preemptions > 0
    for request, row in zip(plain, prompts(3, [8, 8]), strict=True):
        assert request.new == dense_greedy(row, 40)
    same(beams.found, searched([1, 2, 3], Beams(2), 16))


def test_nan_ends_one_search_only() -> None:
    model, executable = decoder()
    executable.nan_token = 11
    bad = model.engine.submit_beams([1, 11], Beams(2), max_new_tokens=4)
    good = model.engine.submit([4], max_new_tokens=1)
    finish(model.engine)
    assert bad.error is not None
    assert bad.error.code == "RUN-030"
    assert good.new == dense_greedy([4], 1)
    assert model.engine.free_blocks == 64


def test_the_bundle_says_how() -> None:
    model, _ = decoder(beams=Beams(3, 2.0, early_stopping=True))
    rows = [[1, 2, 3], [4]]
    assert model.generate(rows, max_new_tokens=6) == [searched(row, Beams(3, 2.0, True), 6)[0].ids for row in rows]
    assert model.generate(rows, max_new_tokens=6, num_beams=1) == [dense_greedy(row, 6) for row in rows]
    changed = model.search(rows, max_new_tokens=6, num_beams=2, num_return_sequences=2, early_stopping=False)
    for row, found in zip(rows, changed, strict=True):
        same(found, searched(row, Beams(2, 2.0, False, 2), 6))
    flat = model.generate(rows, max_new_tokens=6, num_beams=2, num_return_sequences=2, early_stopping=False)
    assert flat == [one.ids for found in changed for one in found]


def test_mistakes() -> None:
    model, _ = decoder()
    row = [[1, 2]]
    check_raises("RUN-020-beams", model.generate, row, num_beams=0)
    check_raises("RUN-020-beams-early", model.generate, row, num_beams=2, early_stopping="always")
    check_raises("RUN-020-beams-length", model.generate, row, num_beams=2, length_penalty=float("inf"))
    check_raises("RUN-020-beams-power", model.generate, row, num_beams=2, length_penalty=50, max_new_tokens=9)
    check_raises("RUN-020-beams-return", model.generate, row, num_beams=2, num_return_sequences=3)
    check_raises("RUN-022", model.generate, row, num_beams=5)
    check_raises("RUN-022-drawn", model.generate, row, num_beams=2, temperature=0.5)
    check_raises("RUN-022-one", model.generate, row, length_penalty=2.0)
    check_raises("RUN-022-search", model.search, row)
    check_raises("RUN-023", lambda: list(model.stream(row, num_beams=2)))
    check_raises("RUN-004", model.generate, row, num_beams=2, tempreature=0.5)
    check_raises("RUN-006", model.generate, row, num_beams=2, max_new_tokens=63)
    check_raises("RUN-007-beams", decoder(12)[0].generate, row, num_beams=4, max_new_tokens=20)
    assert decoder(24)[0].generate(row, num_beams=4, max_new_tokens=20)
    assert not model.engine.busy
