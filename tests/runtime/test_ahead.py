"""Steps that are started before the tokens of the one before are read: the same ids, whoever comes or leaves when."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine import Engine
from runtime.executable import LIKELIEST, Ahead, Picks
from runtime.request import Request
from runtime.sampling import Sampling
from tests.runtime.fake import VOCAB, Behind, FakeExecutable, Picking, dense_greedy

NAN, STOP = 11, frozenset({3, 17, 29, 40})


def engine(blocks: int = 64, seed: int = 0, stages: int = 1, **options: Any) -> tuple[Engine, Behind]:
    device = Behind(blocks, seed, stages)
    return Engine(device, max_sequence=64, vocab=VOCAB, **{"max_batch": 4, **options}), device


def finish(one: Engine) -> None:
    for _ in range(1000):
        if not one.busy:
            return
        one.step()
    raise AssertionError("it does not end")


def test_what_can_run_ahead() -> None:
    assert isinstance(Behind(4), Ahead)
    assert isinstance(Picking(4), Picks)
    assert not isinstance(Picking(4), Ahead)


def test_a_step_is_started_before_the_one_before_is_read() -> None:
    one, device = engine(seed=1)
    requests = [one.submit([1, 2, 3], max_new_tokens=9), one.submit([5], max_new_tokens=9)]
    moved = 0
    while one.busy:
        moved += len(one.step())
    assert moved == 18
    assert [request.new for request in requests] == [dense_greedy([1, 2, 3], 9), dense_greedy([5], 9)]
    # the prompts, then a token each, eight times; the last is known to be the last
    assert (device.given, device.followed) == (9, 8)
    assert device.inner.shapes[1:] == [(2, 2)] * 8


def test_a_stop_token_costs_one_token_of_one_sequence() -> None:
    ids = dense_greedy([7], 12)
    stop = next(at for at in range(3, 12) if ids[at] not in ids[:at])
    one, device = engine()
    ends, goes_on = one.submit([7], max_new_tokens=30, stop={ids[stop]}), one.submit([9, 1], max_new_tokens=20)
    finish(one)
    assert (ends.new, ends.finish) == (ids[: stop + 1], "stop")
    assert (goes_on.new, goes_on.finish) == (dense_greedy([9, 1], 20), "length")
    computed = sum(tokens for _, tokens in device.inner.shapes)
    assert computed == (1 + stop) + (2 + 19) + 1
    assert one.free_blocks == 64


def test_those_that_cannot_join_hinder_nothing() -> None:
    one, device = engine(max_batch=1)
    requests = [one.submit([token], max_new_tokens=10) for token in (1, 2)]
    finish(one)
    assert [request.new for request in requests] == [dense_greedy([token], 10) for token in (1, 2)]
    assert device.followed == 18  # all but the first of each
    assert device.given == 20


def test_who_arrives_joins_the_next_step_but_one() -> None:
    one, device = engine()
    first = one.submit([1, 2, 3], max_new_tokens=20)
    for _ in range(4):
        one.step()
    second = one.submit([4, 5], max_new_tokens=5)
    assert one.step() == [first]  # was under way
    assert one.step() == [first, second]
    finish(one)
    assert first.new == dense_greedy([1, 2, 3], 20)
    assert second.new == dense_greedy([4, 5], 5)
    assert device.followed > 12


def test_cancelled_with_a_step_under_way() -> None:
    one, device = engine()
    first, second = (one.submit([token], max_new_tokens=20) for token in (1, 2))
    for _ in range(3):
        one.step()
    one.cancel(first)
    one.cancel(second)
    assert not one.busy
    assert one.free_blocks == 64
    third = one.submit([6, 7, 8, 9], max_new_tokens=9)
    assert one.step() == [third]  # what is under way is nobody's
    finish(one)
    assert third.new == dense_greedy([6, 7, 8, 9], 9)
    assert len(first.new) == len(second.new) == 3
    assert device.given > device.followed


def on_the_host(prompt: list[int], how: Sampling, count: int) -> list[int]:
    alone = Engine(FakeExecutable(64), max_batch=1, max_sequence=64, vocab=VOCAB)
    request = alone.submit(prompt, how, max_new_tokens=count)
    finish(alone)
    return request.new


def test_drawn_tokens_stay_on_the_device_too() -> None:
    one, device = engine()
    how = Sampling(temperature=6.0, top_k=20, top_p=0.9, seed=1)
    drawn = one.submit([1, 2], how, max_new_tokens=12)
    greedy = one.submit([3], max_new_tokens=12)
    finish(one)
    assert drawn.new == on_the_host([1, 2], how, 12) != dense_greedy([1, 2], 12)
    assert greedy.new == dense_greedy([3], 12)
    assert (device.given, device.followed) == (12, 11)


def test_what_depends_on_more_than_logits_is_read_before_the_next_step() -> None:
    one, device = engine()
    how = Sampling(temperature=0.8, repetition_penalty=1.3, seed=1)
    punished = one.submit([1, 2], how, max_new_tokens=6)
    drawn = one.submit([3], Sampling(temperature=0.7, seed=2), max_new_tokens=12)
    finish(one)
    assert punished.new == on_the_host([1, 2], how, 6)
    assert drawn.new == on_the_host([3], Sampling(temperature=0.7, seed=2), 12)  # six here, six there
    assert device.followed == 5  # of the last six


def test_pieces_of_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    one, device = engine(step_tokens=4)
    launch, seen = device.launch, []

    def recorded(batch: Any, sources: Any = (), how: Any = LIKELIEST, behind: int = 1) -> int:
        seen.append((batch["positions"].tolist(), batch["lengths"].tolist()))
        return launch(batch, sources, how, behind)

    monkeypatch.setattr(device, "launch", recorded)
    request = one.submit(list(range(10, 20)), max_new_tokens=3)
    assert one.step() == one.step() == []  # the first pieces; the one behind is under way
    finish(one)
    assert request.new == dense_greedy(list(range(10, 20)), 3)
    # a prompt counts whole, and each new token when it comes
    assert [lengths for _, lengths in seen] == [[10] * 4, [10] * 4, [10] * 2, [11], [12]]
    assert [place for places, _ in seen for place in places] == list(range(12))


def test_preemption_waits_for_the_tokens() -> None:
    one, device = engine(20)
    rows = np.random.default_rng(1).integers(0, VOCAB, (4, 8)).tolist()
    requests = [one.submit(row, max_new_tokens=40) for row in rows]
    finish(one)
    assert [request.new for request in requests] == [dense_greedy(row, 40) for row in rows]
    assert one.preemptions > 0
    assert device.followed > 0.8 * device.given
    assert one.free_blocks == 20


@pytest.mark.parametrize(("stages", "count"), [(2, 4), (2, 5), (3, 4), (4, 4), (3, 2), (4, 1)])
def test_a_pipeline_has_a_group_in_each_stage(stages: int, count: int) -> None:
    one, device = engine(stages=stages, max_batch=5)
    rows = np.random.default_rng(1).integers(0, VOCAB, (count, 6)).tolist()
    requests = [one.submit(row, max_new_tokens=20) for row in rows]
    finish(one)
    assert [request.new for request in requests] == [dense_greedy(row, 20) for row in rows]
    groups = min(stages, count)
    sizes = [size for size, _ in device.inner.shapes[1:]]  # behind the step that has all prompts
    assert 19 * groups <= len(sizes) <= 20 * groups
    for turn in range(0, 18 * groups, groups):
        assert sorted(sizes[turn : turn + groups]) == sorted((count + i) // groups for i in range(groups))
    if groups == stages:  # who goes on did so in the step that leaves the last stage, but for those behind the prompts
        assert device.early == stages - 1
    assert device.followed > 18 * groups
    assert one.free_blocks == 64


def test_pieces_of_a_prompt_go_one_behind_the_other() -> None:
    """A stage starts the next piece while the one behind has this: nobody waits for tokens."""
    one, device = engine(stages=3, step_tokens=4)
    request = one.submit(list(range(10, 22)), max_new_tokens=2)
    assert one.step() == []
    assert (device.given, device.followed) == (4, 1)  # three pieces, and the first token of the fourth step
    finish(one)
    assert request.new == dense_greedy(list(range(10, 22)), 2)
    assert device.given == 4


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("where", ["wait", "launch", "_revert"])
def test_what_an_interrupt_cuts_off_is_computed_again(where: str, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for after in range(1, 9):
        one, device = engine(seed=after, stages=stages)
        requests = [one.submit([token, 8], max_new_tokens=10) for token in (1, 2)]
        calls = 0
        owner: Any = one if where == "_revert" else device
        plain = getattr(owner, where)

        def cut(*given: Any, plain: Any = plain, after: int = after, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == after:
                raise KeyboardInterrupt
            return plain(*given, **named)

        monkeypatch.setattr(owner, where, cut)
        with pytest.raises(KeyboardInterrupt):
            finish(one)
        finish(one)
        assert [request.new for request in requests] == [dense_greedy([token, 8], 10) for token in (1, 2)]
        assert one.free_blocks == 64


Submit = st.tuples(st.integers(1, 12), st.integers(1, 30), st.booleans(), st.sampled_from([None, None, None, 0.7]))
Moves = st.lists(st.one_of(Submit, st.integers(0, 9), st.none(), st.none(), st.none()), min_size=4, max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    moves=Moves, blocks=st.integers(11, 24), seed=st.integers(0, 99), step_tokens=st.integers(4, 16),
    stages=st.sampled_from([1, 1, 2, 3, 4]),
)  # fmt: skip
def test_whatever_comes_and_goes(moves: list[Any], blocks: int, seed: int, step_tokens: int, stages: int) -> None:
    """A tuple submits, a number cancels, None is a step; few blocks preempt, some tokens stop or lead to NaN.

    Each must get what it gets alone, where every token is read before the next step.
    """
    one, device = engine(blocks, seed, stages, step_tokens=step_tokens)
    alone = Engine(FakeExecutable(blocks), max_batch=1, max_sequence=64, vocab=VOCAB)
    device.inner.nan_token = alone._executable.nan_token = NAN  # type: ignore[attr-defined]
    generator = np.random.default_rng(seed)
    asked: list[tuple[Request, Request]] = []
    for move in moves:
        if isinstance(move, tuple):
            length, new, stops, temperature = move
            prompt = generator.integers(0, VOCAB, length).tolist()
            how = Sampling(temperature=temperature, seed=seed)
            pair = [each.submit(prompt, how, max_new_tokens=new, stop=STOP if stops else ()) for each in (one, alone)]
            asked.append((pair[0], pair[1]))
        elif move is None:
            one.step()
        elif move < len(asked):
            one.cancel(asked[move][0])
    finish(one)
    finish(alone)
    assert one.free_blocks == blocks
    for request, wanted in asked:
        if request.finish == "cancelled":
            assert request.new == wanted.new[: len(request.new)]
        else:
            assert (request.new, request.finish) == (wanted.new, wanted.finish)
