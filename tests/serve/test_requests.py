"""What requests may say: each mistake has its answer; texts are cut where stop strings want it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.model import Model
from serve.app import MOST_BODY, Server
from serve.errors import body_of
from serve.process import listen
from serve.protocol import read_json, read_request
from serve.text import ChoiceText, StopText
from tests.cli.conftest import Cli, cli  # noqa: F401 (a fixture)
from tests.golden_errors import check_golden, check_raises
from tests.serve.conftest import served


def read(body: dict[str, Any], *, chat: bool = False) -> Any:
    return read_request(body, chat=chat, model="demo")


PROMPT = {"prompt": "x"}
HI = {"role": "user", "content": "hi"}
MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("SERVE-002", {**PROMPT, "max_token": 3}, "max_token"),
    ("SERVE-002-far", {**PROMPT, "zzz": 3}, "zzz"),
    ("SERVE-003", {**PROMPT, "temperature": "hot"}, "temperature"),
    ("SERVE-003-prompt", {"prompt": [[1], "x"]}, "prompt"),
    ("SERVE-003-options", {**PROMPT, "stream_options": {"include_usage": True}}, "stream_options"),
    ("SERVE-004", {**PROMPT, "logprobs": 2}, "logprobs"),
    ("SERVE-005", {"max_tokens": 3}, "prompt"),
    ("SERVE-006", {**PROMPT, "model": "other"}, "model"),
]
CHAT_MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("SERVE-003-message", {"messages": ["hi"]}, "messages"),
    ("SERVE-003-content", {"messages": [HI, {"role": "user"}]}, "messages"),
    ("SERVE-003-image", {"messages": [{**HI, "content": [{"type": "image_url"}]}]}, "messages"),
    ("SERVE-003-tool", {"messages": [{**HI, "tool_calls": []}]}, "messages"),
    ("SERVE-003-both", {"messages": [HI], "max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"),
]


@pytest.mark.parametrize(("golden", "body", "param"), MISTAKES + CHAT_MISTAKES, ids=lambda value: str(value)[:20])
def test_mistakes(golden: str, body: dict[str, Any], param: str) -> None:
    error = check_raises(golden, read, body, chat=(golden, body, param) in CHAT_MISTAKES)
    assert body_of(error)["error"]["param"] == param


@pytest.mark.parametrize(
    ("golden", "body"),
    [
        ("SERVE-001", b'{"prompt": '),
        ("SERVE-001-list", b"[1]"),
        ("SERVE-001-deep", b"[" * 100_000),
        ("SERVE-001-bytes", b"\xff"),
        ("SERVE-001-half", b'{"prompt": "\\ud800"}'),
        ("SERVE-001-number", b'{"seed": ' + b"1" * 5000 + b"}"),
    ],
)
def test_bodies_that_are_no_object(golden: str, body: bytes) -> None:
    check_raises(golden, read_json, body)


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": float("nan")}, {"temperature": 1e-9}, {"temperature": True}, {"temperature": 10**400},
        {"top_p": 0}, {"top_k": 0}, {"top_k": 1.5}, {"n": 0}, {"max_tokens": 0}, {"max_tokens": 2.0},
        {"seed": -1}, {"seed": 2**70}, {"repetition_penalty": 0}, {"stop": ""}, {"stop": [""]}, {"stop": 3},
        {"stop_token_ids": ["x"]}, {"stream": 1},
        {"prompt": []}, {"prompt": [[]]}, {"prompt": [True]}, {"prompt": [1, "x"]}, {"prompt": {}}, {"model": 3},
    ],
    ids=str,
)  # fmt: skip
def test_values_that_mean_nothing(field: dict[str, Any]) -> None:
    error = check_raises_code("SERVE-003", {**PROMPT, **field})
    assert (error["param"],) == tuple(field)


def check_raises_code(code: str, body: dict[str, Any]) -> dict[str, Any]:
    from specs.errors import SpecRTError

    with pytest.raises(SpecRTError) as caught:
        read(body)
    assert caught.value.code == code
    return body_of(caught.value)["error"]


def test_values_that_change_nothing_are_taken() -> None:
    neutral = {
        "logprobs": None,
        "echo": False,
        "best_of": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "user": "me",
    }
    assert read({**PROMPT, **neutral, "temperature": None}) == read(PROMPT)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"prompt": ""}, None),
        ({"prompt": "word " * 300}, "RUN-002"),
        ({"prompt": "x", "max_tokens": 300}, "RUN-006"),
        ({"prompt": [4096]}, "RUN-003"),
        ({"prompt": [-1]}, "RUN-003"),
        ({"prompt": [2**70]}, "RUN-003"),
        ({"prompt": "x", "stop_token_ids": [-1]}, "RUN-021"),
    ],
    ids=str,
)
def test_what_the_model_can_not_run_is_400(
    client: httpx2.Client, model: Model, body: dict[str, Any], code: str | None
) -> None:
    code = code if code or model.encode("") else "RUN-001"
    for stream in (False, True):
        answer = client.post("/v1/completions", json={**body, "stream": stream})
        if code is None:
            assert answer.status_code == 200
            continue
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
        assert answer.headers["content-type"] == "application/json"
    assert model.engine.free_blocks == model.engine.blocks


def test_other_answers(client: httpx2.Client) -> None:
    def error(answer: httpx2.Response) -> tuple[int, str]:
        return answer.status_code, answer.json()["error"]["code"]

    assert error(client.get("/v1/completions")) == (405, "SERVE-012")
    assert error(client.get("/v1/nothing")) == (404, "SERVE-009")
    assert error(client.get("/v1/models/other")) == (404, "SERVE-006")
    assert error(client.post("/v1/completions", content=b" " * (MOST_BODY + 1))) == (413, "SERVE-010")
    chat = {"messages": [{"role": "tool", "content": "x"}]}
    assert error(client.post("/v1/chat/completions", json=chat)) == (400, "RUN-052")


def test_names_of_a_template_are_not_those_of_functions(client: httpx2.Client) -> None:
    body = {"messages": [HI], "chat_template_kwargs": {"self": 1, "special": 2, "messages_": []}, "max_tokens": 1}
    assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_goldens_of_the_server(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(model, api_key="secret", queue=0)
    with served(server) as client:
        found = {
            "SERVE-008": client.get("/v1/models"),
            "SERVE-009": client.get("/nothing"),
            "SERVE-010": client.post("/v1/completions", content=b" " * (MOST_BODY + 1), headers=KEY),
            "SERVE-012": client.post("/health"),
        }
        server.open = 4
        found["SERVE-007"] = client.post("/v1/completions", json=PROMPT, headers=KEY)
        server.open = 0
        with monkeypatch.context() as patched:
            patched.setattr(server.thread, "open", lambda _: 1 / 0)
            found["SERVE-014"] = client.post("/v1/completions", json=PROMPT, headers=KEY)
        assert (found["SERVE-014"].status_code, server.open) == (500, 0)
        monkeypatch.setattr(server.thread, "failed", True)
        found["SERVE-011"] = client.post("/v1/completions", json=PROMPT, headers=KEY)
    for golden, answer in found.items():
        error = answer.json()["error"]
        check_golden(golden, f"error[{error['code']}]: " + error["message"].replace("; hint: ", "\nhint: "))


KEY = {"Authorization": "Bearer secret"}


def test_a_port_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Exception, match=rf"can't listen on 127.0.0.1:{port}: Address already in use") as caught:
            listen("127.0.0.1", port)
        check_golden("SERVE-013", str(caught.value).replace(str(port), "PORT"))


def test_without_the_extra(cli: Cli, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    import sys

    monkeypatch.delitem(sys.modules, "serve.process", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = cli("serve", bundle)
    assert done.code == 1
    check_golden("CLI-018", done.err)


@given(st.text("ab\n", max_size=30), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_do_not_depend_on_pieces(text: str, stops: list[str], data: st.DataObject) -> None:
    """The text up to the stop string that is complete first; of those complete at once, the longest."""
    whole = next(
        (text[: end - max(len(s) for s in stops if text[:end].endswith(s))]
         for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stops)), text,
    )  # fmt: skip
    stop, shown, rest = StopText(stops), "", text
    while rest and not stop.hit:
        size = data.draw(st.integers(1, len(rest)))
        shown += stop.push(rest[:size])
        assert whole.startswith(shown)
        rest = rest[size:]
    assert shown + stop.end() == whole
    assert stop.hit == (whole != text)


def test_no_half_characters(model: Model) -> None:
    text = "the sky: 日本 ✓ é 🙂 end"
    ids = model.encode(text)
    choice = ChoiceText(model.tokenizer, (), (), ())
    pieces = [choice.push([token], "length" if place == len(ids) - 1 else None) for place, token in enumerate(ids)]
    assert "".join(pieces) == model.decode(ids)
    assert "🙂" in "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)
    assert json.dumps(choice.finish) == '"length"'
