"""What a user can do wrong with a model, each with its golden text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime.cache import decide_size
from runtime.model import Model
from runtime.program import CacheLayer, CacheLayout
from tests.golden_errors import check_raises
from tests.runtime.fake import FakeEncoder, bundle, decoder

LAYOUT = CacheLayout(32, tuple(CacheLayer(f"{i}.k", f"{i}.v", 8, 128, 128, "f32") for i in range(16)))  # 4 MiB a block


@pytest.mark.parametrize(
    ("golden", "rows"),
    [
        ("RUN-001", [[1], []]),
        ("RUN-002", [[1] * 65]),
        ("RUN-003", [[1, 50]]),
        ("RUN-003-negative", [[-1]]),
        ("RUN-003-flat", [1, 2, 3]),
        ("RUN-003-text", ["a text"]),
        ("RUN-003-string", "a text"),
        ("RUN-003-float", [[0.5]]),
        ("RUN-003-number", 7),
        ("RUN-003-nested", [[[1, 2], [3]]]),
    ],
)
def test_prompts(golden: str, rows: Any) -> None:
    model, _ = decoder()
    encoder = Model(bundle("encoder"), FakeEncoder())
    inputs = {"kinds": [[0]], "shift": [0]}
    check_raises(golden, model.logits, rows)
    check_raises(golden, model.generate, rows, max_new_tokens=1)
    check_raises(golden, encoder.forward, rows, **inputs)
    assert not model.engine.busy


@pytest.mark.parametrize(
    ("golden", "options"),
    [
        ("RUN-004", {"tempreature": 0.5}),
        ("RUN-005", {"max_new_tokens": 0}),
        ("RUN-005-type", {"max_new_tokens": "many"}),
        ("RUN-006", {"max_new_tokens": 63}),
        ("RUN-020-temperature", {"temperature": -0.1}),
        ("RUN-020-top-k", {"top_k": 0}),
        ("RUN-020-top-p", {"top_p": 1.5}),
        ("RUN-020-penalty", {"repetition_penalty": float("nan")}),
        ("RUN-020-seed", {"seed": -1}),
        ("RUN-020-seeds", {"seed": [1, 2]}),
        ("RUN-020-type", {"temperature": "hot"}),
        ("RUN-021", {"stop": [50]}),
        ("RUN-021-type", {"stop": "."}),
    ],
)
def test_generation(golden: str, options: dict[str, Any]) -> None:
    model, _ = decoder()
    check_raises(golden, model.generate, [[1, 2]], **options)
    check_raises(golden, lambda: list(model.stream([[1, 2]], **options)))
    assert not model.engine.busy


def test_a_full_prompt_leaves_no_room() -> None:
    check_raises("RUN-006-full", decoder()[0].generate, [[1] * 64])


def test_a_cache_smaller_than_the_sequence() -> None:
    check_raises("RUN-007", decoder(5)[0].generate, [[1] * 10], max_new_tokens=20)
    check_raises("RUN-007-logits", decoder(5)[0].logits, [[1] * 30])


def test_further_inputs() -> None:
    model, _ = decoder(extra=("prefix",))
    check_raises("RUN-008", model.logits, [[1, 2]])
    check_raises("RUN-008-count", model.logits, [[1, 2]], prefix=[1, 2])
    check_raises("RUN-008-kind", model.logits, [[1, 2]], prefix=["a"])
    check_raises("RUN-008-scalar", model.logits, [[1, 2]], prefix=1)
    check_raises("RUN-004-known", model.logits, [[1, 2]], prefix=[1], suffix=[1])
    encoder = Model(bundle("encoder"), FakeEncoder())
    check_raises("RUN-008-encoder", encoder.forward, [[1, 2]], kinds=[[0, 0]])
    check_raises("RUN-008-rows", encoder.forward, [[1, 2]], kinds=[[0, 0]], shift=3)
    check_raises("RUN-008-type", encoder.forward, [[1, 2]], kinds=[["a", "b"]], shift=[0])
    check_raises("RUN-008-number", encoder.forward, [[1, 2]], kinds=[[0, 0]], shift=[[1]])
    check_raises("RUN-008-tokens", encoder.forward, [[1, 2]], kinds=[[0]], shift=[0])


def test_tokenizer(tmp_path: Path) -> None:
    check_raises("RUN-009", decoder()[0].text, "hello")
    (tmp_path / "tokenizer.json").write_text("{")
    check_raises("RUN-010", decoder(tokenizer=tmp_path / "tokenizer.json")[0].text, "hello")


def test_memory() -> None:
    how = {"max_batch": 8, "max_sequence": 4096}
    check_raises("RUN-011", decide_size, LAYOUT, cache_tokens=None, available=600 << 20, **how)
    check_raises("RUN-011-stated", decide_size, LAYOUT, cache_tokens=8192, available=600 << 20, **how)
    check_raises("RUN-012", decide_size, LAYOUT, cache_tokens=31, available=None, **how)


def test_cache_sizes() -> None:
    how = {"max_batch": 8, "max_sequence": 4096}
    assert decide_size(LAYOUT, cache_tokens=None, available=None, **how).blocks == 1024
    assert decide_size(LAYOUT, cache_tokens=None, available=100 << 30, **how).blocks == 1024
    capped = decide_size(LAYOUT, cache_tokens=None, available=2 << 30, **how)
    assert (capped.blocks, capped.wanted, capped.bytes) == (256, 1024, 1 << 30)
    assert str(capped) == "KV cache: 8192 tokens, 1074 MB of 2147 MB free"
    assert decide_size(LAYOUT, cache_tokens=100, available=600 << 20, **how).blocks == 4
    assert decide_size(LAYOUT, cache_tokens=1 << 30, available=100 << 30, **how).blocks == 1024


def test_settings() -> None:
    check_raises("RUN-013", lambda: decoder(step_tokens=3))


def test_roles() -> None:
    encoder = Model(bundle("encoder"), FakeEncoder())
    check_raises("RUN-014", encoder.generate, [[1]])
    check_raises("RUN-015", encoder.logits, [[1]])


def test_nan() -> None:
    check_raises("RUN-030", decoder(nan_at=2)[0].generate, [[1, 2]])
    check_raises("RUN-030", decoder(nan_at=2)[0].generate, [[1, 2]], temperature=1.0)
