"""Inputs that follow from the tokens."""

from __future__ import annotations

import pytest

from runtime.derive import Rule, read_rules
from tests.runtime.fake import decoder, dense_greedy, dense_logits


def test_rules() -> None:
    rules = read_rules({"a": {"first": [9, 7]}, "b": {"has": 7}, "c": {"fill": 2}, "d": {"ordinals_without": 5}})
    tokens = [5, 7, 5, 3, 7]
    assert {name: rule.apply(name, tokens) for name, rule in rules.items()} == {
        "a": 1, "b": 1, "c": [2] * 5, "d": [0, 1, 0, 2, 3],
    }  # fmt: skip
    assert rules["a"].apply("a", [7, 9]) == 1  # the first id of the rule, not of the prompt


@pytest.mark.parametrize("step_tokens", [None, 8])
def test_a_prefix_that_follows_from_the_prompt(step_tokens: int | None) -> None:
    model, executable = decoder(extra=("prefix",), derive={"prefix": Rule(first=(40,))}, step_tokens=step_tokens)
    rows = [[1, 2, 3, 40, 5], [4, 40], [*range(1, 14), 40, 6]]
    for row, found in zip(rows, model.logits(rows), strict=True):
        assert abs(found - dense_logits(row, prefix=row.index(40))).max() < 1e-4
    assert model.logits(rows, prefix=[0, 0, 0])[0].tolist() != model.logits(rows)[0].tolist()
    assert model.generate([[40, 2, 3]], max_new_tokens=5, stop=()) == [dense_greedy([40, 2, 3], 5)]
    assert executable.shapes
