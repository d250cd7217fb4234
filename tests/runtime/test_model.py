"""The calls that a user makes: streaming, stop tokens, encoders, text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime.model import Event, Model
from runtime.tokenizer import Tokenizer
from tests.runtime.fake import FakeEncoder, bundle, decoder, dense_greedy

DEMO = Path(__file__).parents[2] / "demo" / "tiny-llama"


def test_stop_tokens_end_a_row_and_belong_to_it() -> None:
    plain = dense_greedy([1, 2, 3], 10)
    end = plain[4]
    cut = plain[: plain.index(end) + 1]
    model, _ = decoder(stop=(end,))
    assert model.generate([[1, 2, 3]], max_new_tokens=10) == [cut]
    assert model.generate([[1, 2, 3]], max_new_tokens=10, stop=()) == [plain]
    assert model.generate([[1, 2, 3]], max_new_tokens=10, stop=plain[0]) == [plain[:1]]
    assert decoder()[0].generate([[1, 2, 3]], max_new_tokens=10, stop=[end]) == [cut]


def test_streams_interleave_and_end_with_a_reason() -> None:
    model, _ = decoder()
    one, other = model.stream([[1, 2], [3]], max_new_tokens=3), model.stream([[4]], max_new_tokens=2, stop=())
    assert next(one) == Event(0, dense_greedy([1, 2], 1)[0], 0, None)
    assert [event.token for event in other] == dense_greedy([4], 2)
    rest = list(one)
    assert [(event.row, event.index, event.finish) for event in rest if event.row == 0][-1] == (0, 2, "length")
    assert [event.token for event in rest if event.row == 1] == dense_greedy([3], 3)


def test_a_stream_closed_early_frees_its_blocks() -> None:
    model, _ = decoder()
    stream = model.stream([[1, 2], [3]], max_new_tokens=30)
    next(stream)
    stream.close()
    assert (model.engine.busy, model.engine.free_blocks) == (False, 64)


def test_rows_may_be_arrays_and_none_at_all() -> None:
    model, _ = decoder()
    assert model.generate(np.array([[1, 2, 3]]), max_new_tokens=4) == model.generate([[1, 2, 3]], max_new_tokens=4)
    assert model.generate([]) == model.logits([]) == model.forward([]) == []


def test_forward_of_a_decoder_gives_its_logits() -> None:
    model, _ = decoder()
    (outputs,) = model.forward([[1, 2, 3]])
    np.testing.assert_array_equal(outputs["logits"], model.logits([[1, 2, 3]])[0])


def test_encoder_rows_are_padded_cut_and_equal_to_each_alone() -> None:
    rows = [[1, 2, 3, 4, 5], [6], [7, 8], [9] * 9, [3, 2, 1]]
    inputs = {"kinds": [[0] * len(row) for row in rows], "shift": [0, 1, 2, 3, 4]}
    executable = FakeEncoder()
    model = Model(bundle("encoder"), executable)
    together = model.forward(rows, **inputs)
    assert executable.shapes == [(4, 5), (1, 9)]  # short with short
    for place, row in enumerate(rows):
        (alone,) = model.forward([row], **{name: [values[place]] for name, values in inputs.items()})
        assert together[place]["hidden"].shape == (len(row), 16)
        for name in ("hidden", "pooled"):
            np.testing.assert_allclose(together[place][name], alone[name], atol=1e-6)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO / "tokenizer.json")


@pytest.mark.parametrize(
    "text", ["And God said, Let there be light", "naïve — 日本語 🙂 end", "    def f(x):\n        return x\n"]
)
def test_text_in_pieces_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    for cut in range(len(ids)):
        head, tail = ids[:cut], ids[cut:]
        whole = tokenizer.decode(ids)
        pieces = list(tokenizer.stream(tail, after=head))
        assert "".join(pieces) == tokenizer.decode(tail, after=head)
        if not tokenizer.decode(head).endswith("�"):
            assert tokenizer.decode(head) + "".join(pieces) == whole
            assert not any("�" in piece for piece in pieces)


def test_text_goes_on_from_the_prompt(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    model, _ = decoder(tokenizer=DEMO / "tokenizer.json", vocab=4096)
    prompt, new = tokenizer.encode("And the"), tokenizer.encode(" light was good")
    seen: list[object] = []

    def stream(rows: list[list[int]], **options: object) -> list[Event]:
        seen.append((rows, options))
        return [Event(0, token, index, None) for index, token in enumerate(new)]

    monkeypatch.setattr(model, "stream", stream)
    assert (
        model.text("And the", top_k=3) == "".join(model.text_stream("And the")) == tokenizer.decode(new, after=prompt)
    )
    assert seen == [([prompt], {"top_k": 3}), ([prompt], {})]
