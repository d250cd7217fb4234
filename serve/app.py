"""The HTTP side: paths, who may call them, how much may wait, and OpenAI's shapes of answers."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from runtime.model import Model
from serve.answers import Shape
from serve.engine import EngineThread
from serve.errors import RequestError, body_of, status_of, told
from serve.generation import Generation, jobs_of
from serve.metrics import CONTENT_TYPE, Metrics
from serve.protocol import Asked, read_json, read_request
from specs.errors import SpecRTError

MOST_BODY = 16 * 2**20  # bytes of a request
T = TypeVar("T")


class Server:
    """Serves one model; `app` is the ASGI application, whose lifespan is that of the engine's thread."""

    def __init__(self, model: Model, *, name: str | None = None, api_key: str | None = None, queue: int = 64) -> None:
        """`name` is what clients call the model; `queue` is how many sequences may wait beside those that run.

        Raises SpecRTError RUN-014 for an encoder, RUN-009 for a bundle without a tokenizer.
        """
        self.model, self.name, self._key = model, name or model.bundle.name, api_key
        _ = model.tokenizer  # answers are text: without one there is nothing to serve
        self.thread = EngineThread(model.engine)
        self.metrics = Metrics(model.engine, self.name)
        self.most_open = model.limits.max_batch + queue
        self.open = 0  # sequences that run or wait
        self._began = int(time.time())
        paths: dict[str, tuple[str, Callable[[Request], Awaitable[Response]]]] = {
            "/v1/completions": ("POST", self._completions),
            "/v1/chat/completions": ("POST", self._chat),
            "/v1/models": ("GET", self._models),
            "/v1/models/{model:path}": ("GET", self._one_model),
            "/health": ("GET", self._health),
            "/metrics": ("GET", self._metrics),
        }
        routes = [Route(path, self._guarded(path, call), methods=[method]) for path, (method, call) in paths.items()]
        handlers: dict[Any, Any] = {HTTPException: self._no_path}
        self.app = Starlette(routes=routes, lifespan=self._lifespan, exception_handlers=handlers)

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self.thread.start()
        yield
        await run_in_threadpool(self.thread.stop)

    # -- around every path ------------------------------------------------------------------------------------------

    def _guarded(self, path: str, call: Callable[[Request], Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
        """The same with the key checked, mistakes as answers, and answers counted."""

        async def endpoint(request: Request) -> Response:
            try:
                if path.startswith("/v1/"):
                    self._check_key(request)
                answer = await call(request)
            except ClientDisconnect:
                answer = Gone()
            except Exception as error:  # noqa: BLE001 (bugs are answers too, in the shape that clients read)
                answer = _failure(told(error))
            if not isinstance(answer, EventStream):  # which counts itself at its end
                gone = isinstance(answer, Gone)
                self.metrics.answered(path, "gone" if gone else str(answer.status_code))
            return answer

        return endpoint

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self._key and not secrets.compare_digest(given.encode(), f"Bearer {self._key}".encode()):
            what = "is not the right one" if given else "is missing"
            hint = "send `Authorization: Bearer KEY`, with the key that the server was started with"
            raise RequestError("SERVE-008", f"the API key {what}", hint=hint, headers={"WWW-Authenticate": "Bearer"})

    async def _no_path(self, request: Request, error: HTTPException) -> Response:
        path = request.url.path
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            message = f"{request.method} {path} is not served, expected {allowed.replace('HEAD', '').strip(', ')}"
            return _failure(RequestError("SERVE-012", message, headers=error.headers))
        hint = "/v1/completions, /v1/chat/completions, /v1/models, /health and /metrics are"
        return _failure(RequestError("SERVE-009", f"{path} is not served", hint=hint))

    # -- paths ------------------------------------------------------------------------------------------------------

    async def _models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _one_model(self, request: Request) -> Response:
        if (asked := request.path_params["model"]) != self.name:
            hint = f"this server has one model: `{self.name}`"
            raise RequestError("SERVE-006", f"there is no model `{asked}`", param="model", hint=hint)
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        longest = self.model.limits.max_sequence
        return {
            "id": self.name,
            "object": "model",
            "created": self._began,
            "owned_by": "specrt",
            "max_model_len": longest,
        }

    async def _health(self, _request: Request) -> Response:
        failed = self.thread.failed
        return JSONResponse({"status": "engine stopped" if failed else "ok"}, 503 if failed else 200)

    async def _metrics(self, _request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _completions(self, request: Request) -> Response:
        return await self._generate(request, chat=False)

    async def _chat(self, request: Request) -> Response:
        return await self._generate(request, chat=True)

    # -- generation -------------------------------------------------------------------------------------------------

    async def _generate(self, request: Request, *, chat: bool) -> Response:
        asked = read_request(read_json(await _body(request)), chat=chat, model=self.name)
        count = len(asked.prompts) * asked.n
        self._check_room(count)
        self.open += count
        try:
            jobs = await run_in_threadpool(jobs_of, self.model, asked)
            generation = Generation(self.model, self.thread, self.metrics, asked, jobs)
        except BaseException:
            self.open -= count
            raise
        shape = Shape(self.name, asked.chat)
        stream = None
        try:
            if asked.stream:
                await generation.accepted()  # what can't be run is an answer of its own, not a broken stream
                stream = EventStream(self, generation, shape, asked, request.url.path)
                return stream
            answer = await _unless_gone(request.receive, self._whole(generation, shape))
            return Gone() if answer is None else answer
        finally:
            if stream is None:
                self._close(generation)

    def _check_room(self, count: int) -> None:
        if self.thread.failed:
            raise RequestError("SERVE-011", "the engine has stopped", hint="the server must be started again")
        if count > self.most_open:
            message = f"the request has {count} sequences, the server holds {self.most_open} at once"
            raise RequestError(
                "SERVE-003", message, param="n", hint="ask for fewer, or start it with a longer `--queue`"
            )
        if self.open + count > self.most_open:
            whole = self.metrics.whole
            wait = max(1, math.ceil(whole.sum / whole.count)) if whole.count else 1  # as long as one takes
            message = f"the queue is full: {self.open} of {self.most_open} sequences run or wait"
            raise RequestError(
                "SERVE-007", message, hint=f"try again in {wait} s", headers={"Retry-After": str(wait)}
            )  # fmt: skip

    def _close(self, generation: Generation) -> None:
        if generation.close():
            self.open -= len(generation.choices)

    async def _whole(self, generation: Generation, shape: Shape) -> Response:
        await generation.accepted()
        texts = [""] * len(generation.choices)
        async for piece in generation.pieces():
            texts[piece.choice] += piece.text
        finishes = [choice.finish for choice in generation.choices]
        usage = shape.usage(generation.prompt_tokens, generation.new_tokens)
        return JSONResponse(shape.whole(texts, finishes, usage))


class Gone(Response):
    """For a client that went away: nobody reads it."""


class EventStream(Response):
    """Pieces as server-sent events; what is left is cancelled when the client goes away."""

    def __init__(self, server: Server, generation: Generation, shape: Shape, asked: Asked, path: str) -> None:
        super().__init__(headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._server, self._generation, self._shape, self._asked, self._path = server, generation, shape, asked, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 (ASGI's signature)
        status = "gone"
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            status = await _unless_gone(receive, self._send(send)) or "gone"
        finally:
            self._server._close(self._generation)
            self._server.metrics.answered(self._path, status)

    async def _send(self, send: Send) -> str:
        """The status that counts: an error after the first byte can't change the one that was sent."""
        status = "200"
        try:
            async for event in self._events():
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:  # noqa: BLE001 (as around whole answers)
            mistake = told(error)
            status = str(status_of(mistake))
            await send({"type": "http.response.body", "body": _event(body_of(mistake)), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        return status

    async def _events(self) -> AsyncIterator[bytes]:
        generation, shape, usage = self._generation, self._shape, self._asked.usage
        for chunk in shape.opening(len(generation.choices)):
            yield _event(chunk)
        async for piece in generation.pieces():
            yield _event(shape.piece(piece.choice, piece.text, piece.finish))
        if usage:
            yield _event(shape.last(shape.usage(generation.prompt_tokens, generation.new_tokens)))


async def _body(request: Request) -> bytes:
    """The body of a request. Raises RequestError SERVE-010 for one that is too large."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BODY:
            raise RequestError("SERVE-010", f"the body is larger than {MOST_BODY // 2**20} MiB", hint="send less text")
    return bytes(body)


async def _unless_gone(receive: Receive, work: Awaitable[T]) -> T | None:
    """Do the work, unless the client goes away before it is done."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


def _failure(error: SpecRTError) -> Response:
    headers = error.headers if isinstance(error, RequestError) else None
    return JSONResponse(body_of(error), status_of(error), headers=headers)


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
