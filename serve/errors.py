"""Mistakes of a client, in the shape that OpenAI's clients read and in our words: what, expected, got, hint."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from typing import Any

from specs.errors import SpecRTError

_STATUS = {  # 400 where nothing is said
    "SERVE-006": 404, "SERVE-007": 429, "SERVE-008": 401, "SERVE-009": 404, "SERVE-010": 413, "SERVE-011": 503,
    "SERVE-012": 405, "SERVE-014": 500, "RUN-030": 500,
}  # fmt: skip
_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class RequestError(SpecRTError):
    """A mistake in a request; `param` is the field that it is in, `headers` belong to the answer."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        hint: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(code, message, hint=hint)
        self.param, self.headers = param, dict(headers or {})


def told(error: Exception) -> SpecRTError:
    """What a client hears of it; a bug is in the log with its traceback."""
    if isinstance(error, SpecRTError):
        return error
    traceback.print_exception(error, file=sys.stderr)
    message = f"a bug in the server: {type(error).__name__}: {error}"
    return RequestError("SERVE-014", message, hint="its log has the traceback, please report it")


def status_of(error: SpecRTError) -> int:
    """The HTTP status that tells it."""
    return _STATUS.get(error.code, 400)


def body_of(error: SpecRTError) -> dict[str, Any]:
    """OpenAI's object: clients show `message`, so it has the hint too."""
    message = error.message if error.hint is None else f"{error.message}; hint: {error.hint}"
    message = message.replace("`max_new_tokens`", "`max_tokens`")  # the runtime's name and the protocol's
    kind = _TYPES.get(status_of(error), "invalid_request_error")
    param = error.param if isinstance(error, RequestError) else None
    return {"error": {"message": message, "type": kind, "param": param, "code": error.code}}
