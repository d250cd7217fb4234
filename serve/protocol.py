"""What a request may say: every field with its meaning here, so that none is ignored without a word.

Defaults are OpenAI's (temperature 1; 16 new tokens of a completion, of a chat what the limit leaves). Fields beyond
theirs have the names that other servers gave them: top_k, repetition_penalty, stop_token_ids, ignore_eos,
chat_template_kwargs.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runtime.sampling import Sampling
from serve.errors import RequestError

NEW_TOKENS = 16  # of a completion that does not say how many
MOST_SEED = 2**63


@dataclass(frozen=True)
class Asked:
    """A request whose fields are all understood; prompts are texts, ids or messages."""

    prompts: list[Any]
    chat: bool
    sampling: dict[str, Any]
    seed: int | None
    n: int
    max_tokens: int | None
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    ignore_eos: bool
    stream: bool
    usage: bool  # also at the end of a stream
    variables: Mapping[str, Any]  # of the chat template

    def how(self, choice: int) -> Sampling:
        """How one of `n` choices is drawn: with a seed of its own where one is given."""
        return Sampling(seed=None if self.seed is None else self.seed + choice, **self.sampling)


def read_json(body: bytes) -> dict[str, Any]:
    """The object of a request. Raises RequestError SERVE-001."""
    try:
        content = json.loads(body.decode())
        if b"\\u" in body:  # escapes can write halves of characters, which are no text
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = _reason(error)
        hint = "send one object with the header `Content-Type: application/json`"
        raise RequestError("SERVE-001", f"the body is not JSON: {reason}", hint=hint) from error
    if not isinstance(content, dict):
        raise RequestError("SERVE-001", f"the body is {_found(content)}, expected an object")
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}"
    if isinstance(error, UnicodeEncodeError):
        return "an escape is half of a character"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"


def read_request(content: Mapping[str, Any], *, chat: bool, model: str) -> Asked:
    """Every field checked. Raises RequestError SERVE-002 to SERVE-006."""
    fields = _FIELDS | (_CHAT if chat else _COMPLETION)
    given: dict[str, Any] = {}
    for name, value in content.items():
        if name in fields:
            expected, accept = fields[name]
            if value is None:
                continue  # as if it were not there
            if not accept(value):
                message = f"`{name}` is {_found(value)}, expected {expected}"
                raise RequestError("SERVE-003", message, param=name)
            given[name] = value
        elif name in _NEUTRAL:
            if not any(value == neutral and type(value) is type(neutral) for neutral in (None, *_NEUTRAL[name])):
                hint = "leave it out"
                message = f"`{name}` is {_found(value)}: this server does not do that"
                raise RequestError("SERVE-004", message, param=name, hint=hint)
        else:
            near = difflib.get_close_matches(name, [*fields, *_NEUTRAL], 1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(sorted(fields))}"
            raise RequestError("SERVE-002", f"unknown field `{name}`", param=name, hint=hint)
    needed = "messages" if chat else "prompt"
    if needed not in given:
        raise RequestError("SERVE-005", f"`{needed}` is missing", param=needed, hint=f"give {fields[needed][0]}")
    if given.get("model", model) != model:
        hint = f"this server has one model: `{model}`"
        raise RequestError("SERVE-006", f"there is no model `{given['model']}`", param="model", hint=hint)
    return _asked(given, chat)


def _asked(given: Mapping[str, Any], chat: bool) -> Asked:
    if "max_tokens" in given and "max_completion_tokens" in given:
        message = "`max_tokens` and `max_completion_tokens` are both given, expected one of them"
        raise RequestError("SERVE-003", message, param="max_completion_tokens")
    most = given.get("max_completion_tokens", given.get("max_tokens", None if chat else NEW_TOKENS))
    stop = given.get("stop", ())
    options = given.get("stream_options", {})
    if options and not given.get("stream"):
        raise RequestError(
            "SERVE-003", "`stream_options` is given, expected it with `stream: true` only", param="stream_options"
        )
    sampling = {name: given[name] for name in ("top_k", "top_p", "repetition_penalty") if name in given}
    return Asked(
        prompts=[_message(given["messages"])] if chat else _prompts(given["prompt"]),
        chat=chat,
        sampling={"temperature": given.get("temperature", 1), **sampling},
        seed=given.get("seed"),
        n=given.get("n", 1),
        max_tokens=most,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_ids=tuple(given.get("stop_token_ids", ())),
        ignore_eos=given.get("ignore_eos", False),
        stream=given.get("stream", False),
        usage=options.get("include_usage", False),
        variables=given.get("chat_template_kwargs", {}),
    )


def _prompts(prompt: Any) -> list[Any]:
    """One prompt or several, each a text or ids."""
    several = isinstance(prompt, list) and not _whole(prompt[0])
    return prompt if several else [prompt]


def _message(messages: list[Any]) -> list[dict[str, str]]:
    """Messages with their content as one text. Raises RequestError SERVE-003."""
    return [_plain(f"messages[{place}]", message) for place, message in enumerate(messages)]


def _plain(place: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RequestError("SERVE-003", f"`{place}` is {_found(message)}, expected an object", param="messages")
    for key, value in message.items():
        if key not in ("role", "content", "name") and value is not None:
            message_ = f"`{place}` has `{key}`, expected `role`, `content` and perhaps `name`"
            raise RequestError("SERVE-003", message_, param="messages", hint="tools and images are not supported")
    content = message.get("content")
    if isinstance(content, list):  # parts: those of text, joined
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                expected = 'parts `{"type": "text", "text": ...}`'
                text = f"`{place}.content` has {_found(part)}, expected {expected}"
                raise RequestError("SERVE-003", text, param="messages", hint="this server reads text only")
        content = "\n".join(part["text"] for part in content)
    found = {"role": message.get("role"), "content": content, "name": message.get("name", "")}
    for key, value in found.items():
        if not isinstance(value, str):
            text = f"`{place}.{key}` is {_found(value)}, expected text"
            raise RequestError("SERVE-003", text, param="messages")
    return {key: value for key, value in found.items() if value or key != "name"}


def _found(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- fields: what is expected, and whether a value is ------------------------------------------------------------------

Field = tuple[str, Callable[[Any], bool]]


def _whole(value: object) -> bool:
    return type(value) is int


def _between(least: float, most: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and least <= value <= most


def _count(most: int, least: int = 1) -> Callable[[Any], bool]:
    return lambda value: _whole(value) and least <= value <= most


def _bool(value: object) -> bool:
    return isinstance(value, bool)


def _text(value: object) -> bool:
    return isinstance(value, str)


def _object(value: object) -> bool:
    return isinstance(value, dict)


def _ids(value: object) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


def _stops(value: object) -> bool:
    return _filled(value) or (isinstance(value, list) and all(map(_filled, value)))


def _filled(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _prompt(value: object) -> bool:
    if isinstance(value, str):
        return True
    if not isinstance(value, list) or not value:
        return False
    return _ids(value) or all(map(_text, value)) or all(one and _ids(one) for one in value)


_FIELDS: dict[str, Field] = {
    "model": ("text", _text),
    "max_tokens": ("a whole number from 1 up", _count(2**31)),
    # float32 divides by it: what is nearer to 0 than this would overflow
    "temperature": (
        "0 (greedy), or a number from 0.0001 to 10000",
        lambda value: _between(1e-4, 1e4)(value) or _between(0, 0)(value),
    ),
    "top_p": ("a number above 0, at most 1", lambda value: _between(0, 1)(value) and value > 0),
    "top_k": ("a whole number from 1 up", _count(2**31)),
    "repetition_penalty": ("a number from 0.01 to 100; 1 is none", _between(0.01, 100)),
    "seed": (f"a whole number from 0 to {MOST_SEED}", _count(MOST_SEED, 0)),
    "n": ("a whole number from 1 up", _count(2**31)),
    "stop": ("a text that is not empty, or a list of such", _stops),
    "stop_token_ids": ("a list of token ids", _ids),
    "ignore_eos": ("true or false", _bool),
    "stream": ("true or false", _bool),
    "stream_options": (
        "`{include_usage: true or false}`",
        lambda value: _object(value) and all(key == "include_usage" and _bool(one) for key, one in value.items()),
    ),
    "user": ("text", _text),  # whose request it is: changes nothing
}
_COMPLETION: dict[str, Field] = {"prompt": ("a text, a list of token ids, or a list of either", _prompt)}
_CHAT: dict[str, Field] = {
    "messages": (
        "a list of messages, each with `role` and `content`",
        lambda value: isinstance(value, list) and len(value) > 0,
    ),
    "max_completion_tokens": ("a whole number from 1 up", _count(2**31)),
    "chat_template_kwargs": (
        "an object with names of the chat template, but not `messages`",
        lambda value: _object(value) and "messages" not in value,
    ),
}
# OpenAI's fields of which only the value that changes nothing can be had
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,), "top_logprobs": (), "echo": (False,), "suffix": ("",), "best_of": (1,),
    "presence_penalty": (0, 0.0), "frequency_penalty": (0, 0.0), "logit_bias": ({},), "tools": ([],),
    "tool_choice": ("none",), "parallel_tool_calls": (False,), "functions": ([],), "function_call": ("none",),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": (), "verbosity": (), "web_search_options": (), "store": (False,), "metadata": ({},),
    "service_tier": ("auto", "default"),
}  # fmt: skip
