"""The server as its clients see it: texts, streams, stops, queue, disconnects, keys, the end."""

from __future__ import annotations

import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from runtime.model import Model
from serve.app import Server
from tests.cli.conftest import start
from tests.serve.conftest import VERSE, served, until

GREEDY: dict[str, Any] = {"prompt": VERSE, "max_tokens": 12, "temperature": 0}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the heaven?"}]


def complete(client: httpx2.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(client: httpx2.Client, **body: Any) -> str:
    return complete(client, **body)["choices"][0]["text"]


def events(client: httpx2.Client, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    answer = client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *found, last, rest = answer.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in found]


def streamed(client: httpx2.Client, **body: Any) -> tuple[list[str], list[str | None]]:
    """Texts and reasons of the choices of a stream."""
    count = body.get("n", 1)
    texts, finishes = [""] * count, [None] * count
    for event in events(client, **body):
        for choice in event["choices"]:
            assert finishes[choice["index"]] is None
            texts[choice["index"]] += choice["text"]
            finishes[choice["index"]] = choice["finish_reason"]
    return texts, finishes


def test_greedy_text_is_the_models(client: httpx2.Client, model: Model) -> None:
    answer = complete(client, **GREEDY)
    assert answer["choices"] == [
        {"index": 0, "text": model.text(VERSE, max_new_tokens=12), "logprobs": None, "finish_reason": "length"}
    ]
    prompt = len(model.encode(VERSE))
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12}
    assert answer["model"] == "demo"
    assert text_of(client, **{**GREEDY, "prompt": model.encode(VERSE)}) == model.text(VERSE, max_new_tokens=12)


def test_a_stream_says_what_a_whole_answer_says(client: httpx2.Client) -> None:
    body = {"prompt": VERSE, "max_tokens": 20, "seed": 3, "n": 3, "stop": ["the", "\n"], "temperature": 1.2}
    whole = complete(client, **body)
    assert streamed(client, **body) == (
        [choice["text"] for choice in whole["choices"]],
        [choice["finish_reason"] for choice in whole["choices"]],
    )
    last = events(client, **body, stream_options={"include_usage": True})[-1]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])


def test_sixteen_at_once_say_what_each_says_alone(client: httpx2.Client) -> None:
    words = VERSE.split()
    bodies = [
        {"prompt": " ".join(words[: 1 + i % 8]), "max_tokens": 5 + 3 * i, "seed": i, "temperature": i % 2}
        for i in range(16)
    ]
    alone = [text_of(client, **body) for body in bodies]
    with ThreadPoolExecutor(16) as pool:
        together = list(
            pool.map(lambda one: streamed(client, **one)[0][0] if one["seed"] % 3 else text_of(client, **one), bodies)
        )
    assert together == alone


def test_who_else_steps_the_engine_changes_nothing(client: httpx2.Client, model: Model) -> None:
    body = {**GREEDY, "max_tokens": 60, "stop": ["LORD of"]}
    alone = text_of(client, **body)
    with ThreadPoolExecutor(3) as pool:
        served = [pool.submit(text_of, client, **body) for _ in range(12)]
        texts = {model.text("And", max_new_tokens=20) for _ in range(12)}
    assert {one.result() for one in served} == {alone}
    assert len(texts) == 1


def test_several_prompts_are_choices_of_one_answer(client: httpx2.Client, model: Model) -> None:
    answer = complete(client, prompt=[VERSE, "And"], n=2, max_tokens=4, temperature=0)
    texts = [model.text(prompt, max_new_tokens=4) for prompt in (VERSE, VERSE, "And", "And")]
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert answer["usage"]["prompt_tokens"] == len(model.encode(VERSE)) + len(model.encode("And"))


def test_choices_differ_by_seed(client: httpx2.Client, model: Model) -> None:
    answer = complete(client, prompt=VERSE, n=2, seed=5, max_tokens=8)  # temperature 1 is the protocol's default
    texts = [model.text(VERSE, max_new_tokens=8, temperature=1.0, seed=seed) for seed in (5, 6)]
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert texts[0] != texts[1]


@pytest.mark.parametrize("stop", ["n.\nA", "LORD", " heaven.", " ", "dnA\n"])
def test_stop_strings_across_tokens(client: httpx2.Client, model: Model, stop: str) -> None:
    text = model.text(VERSE, max_new_tokens=12)
    expected = text.split(stop)[0]
    answer = complete(client, **GREEDY, stop=stop)
    assert answer["choices"][0]["text"] == expected
    assert answer["choices"][0]["finish_reason"] == ("stop" if stop in text else "length")
    assert streamed(client, **GREEDY, stop=[stop])[0] == [expected]
    if stop in text:  # tokens are counted to the one that completes the stop string
        ids = model.encode(VERSE)
        new = model.generate([ids], max_new_tokens=12)[0]
        needed = next(n for n in range(1, 13) if stop in model.decode(new[:n], after=ids))
        assert answer["usage"]["completion_tokens"] == needed


def test_stop_tokens_give_no_text(client: httpx2.Client, model: Model) -> None:
    new = model.generate([model.encode(VERSE)], max_new_tokens=12)[0]
    answer = complete(client, **GREEDY, stop_token_ids=[new[4]])
    assert answer["choices"][0]["text"] == model.decode(new[: new.index(new[4])], after=model.encode(VERSE))
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == new.index(new[4]) + 1


def test_openais_client(client: httpx2.Client, model: Model) -> None:
    theirs = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    assert [card.id for card in theirs.models.list()] == ["demo"]
    assert theirs.models.retrieve("demo").id == "demo"
    done = theirs.completions.create(model="demo", **GREEDY)
    assert done.choices[0].text == model.text(VERSE, max_new_tokens=12)
    ids = model.chat(MESSAGES)
    expected = model.decode(model.generate([ids], max_new_tokens=10)[0], after=ids)
    ask: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_completion_tokens": 10, "temperature": 0}
    chat = theirs.chat.completions.create(**ask)
    assert (chat.choices[0].message.role, chat.choices[0].message.content) == ("assistant", expected)
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (len(ids), 10)
    chunks = list(theirs.chat.completions.create(**ask, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert (chunks[0].choices[0].delta.role, chunks[-1].choices[0].finish_reason) == ("assistant", "length")
    with pytest.raises(
        openai.NotFoundError, match="there is no model `other`; hint: this server has one model: `demo`"
    ):
        theirs.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError) as caught:
        theirs.chat.completions.create(model="demo", messages=MESSAGES, logprobs=True)
    assert (caught.value.code, caught.value.param) == ("SERVE-004", "logprobs")


def test_a_chat_takes_what_the_limit_leaves(client: httpx2.Client, model: Model) -> None:
    body = {"messages": MESSAGES, "temperature": 0, "ignore_eos": True}
    usage = client.post("/v1/chat/completions", json=body).json()["usage"]
    assert usage["total_tokens"] == model.limits.max_sequence
    content = [{"type": "text", "text": "Where is"}, {"type": "text", "text": "it?"}]
    joined = client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    )
    assert joined.json()["usage"]["prompt_tokens"] == len(model.chat([{"role": "user", "content": "Where is\nit?"}]))


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_its_blocks(client: httpx2.Client, server: Server, model: Model, stream: bool) -> None:
    body = {"prompt": VERSE, "max_tokens": 200, "ignore_eos": True, "n": 2, "stream": stream}
    before = server.metrics.answers.get(("/v1/completions", "gone"), 0)
    with pytest.raises(httpx2.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=0.5) if not stream else _leave(client, body)
    assert until(lambda: model.engine.free_blocks == model.engine.blocks)
    assert until(lambda: server.metrics.answers.get(("/v1/completions", "gone"), 0) == before + 1)
    assert server.open == 0
    assert text_of(client, **GREEDY) == model.text(VERSE, max_new_tokens=12)


def _leave(client: httpx2.Client, body: dict[str, Any]) -> None:
    with client.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    raise httpx2.ReadTimeout("left after the first line")


@pytest.mark.usefixtures("slow")
def test_a_full_queue_says_when_to_come_again(model: Model) -> None:
    with served(Server(model, queue=1)) as client:
        with client.stream(
            "POST", "/v1/completions", json={**GREEDY, "n": 4, "max_tokens": 200, "stream": True}
        ) as first:
            lines = first.iter_lines()  # held: an iterator that goes takes its connection along
            next(lines)
            refused = client.post("/v1/completions", json={**GREEDY, "n": 2})
            assert refused.status_code == 429, refused.text
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["message"].startswith("the queue is full: 4 of 5 sequences run or wait")
            with pytest.raises(httpx2.ReadTimeout):  # there is room for one, which waits
                client.post("/v1/completions", json=GREEDY, timeout=0.3)
        assert until(
            lambda: client.post("/v1/completions", json={**GREEDY, "n": 5, "max_tokens": 1}).status_code == 200
        )
        never = client.post("/v1/completions", json={**GREEDY, "n": 6})
        assert (never.status_code, never.json()["error"]["param"]) == (400, "n")


def test_only_with_the_key(model: Model) -> None:
    with served(Server(model, api_key="secret")) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            answer = client.get("/v1/models", headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "SERVE-008")
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client.get("/health").json() == {"status": "ok"}


def test_metrics_count(model: Model) -> None:
    with served(Server(model)) as client:
        complete(client, **GREEDY, n=2)
        text = client.get("/metrics").text
    values = dict(re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", text, re.M))
    assert values['specrt_requests_total{path="/v1/completions",status="200"}'] == "1"
    assert values["specrt_prompt_tokens_total"] == str(len(model.encode(VERSE)))
    assert values["specrt_new_tokens_total"] == "24"
    assert values["specrt_time_to_first_token_seconds_count"] == "2"
    assert values["specrt_time_per_output_token_seconds_count"] == "22"
    assert values['specrt_request_seconds_bucket{le="+Inf"}'] == "2"
    assert (values["specrt_cache_blocks_used"], values["specrt_cache_blocks"]) == ("0", str(model.engine.blocks))


def test_an_engine_that_fails_is_told_and_not_healthy(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("no device")

    with served(Server(model)) as client:
        monkeypatch.setattr(model.engine, "step", broken)
        first, later = (client.post("/v1/completions", json=GREEDY) for _ in range(2))
        assert first.json()["error"]["message"].startswith("the engine stopped: RuntimeError: no device")
        assert [first.status_code, later.status_code, client.get("/health").status_code] == [503] * 3
    assert model.engine.free_blocks == model.engine.blocks


@pytest.mark.parametrize("drain", [60, 0])
def test_sigterm_lets_clients_finish_while_there_is_time(bundle: Path, drain: int) -> None:
    process = start(["serve", bundle, "--port", 0, "--drain", drain])
    try:
        line = process.stderr.readline()
        url = re.search(r"http://\S+(?=/v1;)", line)[0]
        body = {"prompt": VERSE, "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 1 if drain else 60}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        last = json.loads(rest[-2].removeprefix("data: "))
        if drain:
            assert last["choices"][0]["finish_reason"] == "length"
        else:
            assert last["error"]["message"] == "the server shuts down; hint: send the request again once it is back"
        assert process.wait(20) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()
