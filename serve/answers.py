"""OpenAI's shapes of answers: of completions and of chats, whole and in pieces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any


class Shape:
    """The answer to one request: its id and time are in every piece."""

    def __init__(self, model: str, chat: bool) -> None:
        self._chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: Sequence[str], finishes: Sequence[str | None], usage: dict[str, int]) -> dict[str, Any]:
        """All choices at once."""
        choices = []
        for index, (text, finish) in enumerate(zip(texts, finishes, strict=True)):
            content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            choices.append({"index": index, **content, "logprobs": None, "finish_reason": finish})
        return {**self._head, "choices": choices, "usage": usage}

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """What comes before the first piece: of a chat, who speaks."""
        if not self._chat:
            return []
        return [self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None) for index in range(choices)]

    def piece(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """Text that a choice grows by."""
        delta = {"content": text} if text else {}
        return self._chunk(index, {"delta": delta} if self._chat else {"text": text}, finish)

    def last(self, usage: dict[str, int]) -> dict[str, Any]:
        """What a stream ends with where its usage is asked for."""
        return {**self._streamed, "choices": [], "usage": usage}

    def usage(self, prompt: int, new: int) -> dict[str, int]:
        """Counts of tokens."""
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    @property
    def _streamed(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"} if self._chat else self._head

    def _chunk(self, index: int, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {**self._streamed, "choices": [{"index": index, **content, "logprobs": None, "finish_reason": finish}]}
