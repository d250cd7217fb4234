"""The process of a server: its socket, and an end that lets clients finish."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn

from serve.app import Server
from specs.errors import SpecRTError

_UNREAD = 5  # seconds for clients to read that they are given up
# uvicorn's own puts lines of requests on stdout and tells each step of its start
_LOGS: dict[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {
        "uvicorn.error": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
        "uvicorn.access": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
    },
}


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises SpecRTError SERVE-013."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        hint = "name another `--host` or `--port`; port 0 takes a free one"
        raise SpecRTError("SERVE-013", f"can't listen on {host}:{port}: {reason}", hint=hint) from error
    return listener


def run(server: Server, listener: socket.socket, *, drain: int, log: bool, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then take nothing new and wait up to `drain` seconds for what runs."""

    class Uvicorn(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(drain, server.thread.give_up)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        server.app,
        lifespan="on",
        log_config=_LOGS,
        access_log=log,
        server_header=False,
        timeout_graceful_shutdown=drain + _UNREAD,
    )
    # uvicorn raises the signal again once it is done; it was obeyed, so the process ends as one that did its work
    with suppress(KeyboardInterrupt, SystemExit):
        Uvicorn(config).run([listener])
