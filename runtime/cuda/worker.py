"""A process of one rank: what rank 0 asks for comes through a pipe, one thing after the other.

Started by runtime.cuda.workers as `python -m runtime.cuda.worker FD`: a new interpreter, since CUDA survives no fork,
and not multiprocessing's, which would run the user's script again.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

from specs.errors import SpecRTError, Where

CLOSE = "close"


@dataclass(frozen=True)
class Failed:
    """What went wrong in a rank, as it passes a pipe: the parts of a SpecRTError, or the text of another error."""

    code: str | None
    message: str
    where: Where | None = None
    hint: str | None = None
    notes: tuple[str, ...] = ()


def failed(error: BaseException) -> Failed:
    """An error for the pipe."""
    if isinstance(error, SpecRTError):
        return Failed(error.code, error.message, error.where, error.hint, error.notes)
    return Failed(None, f"{type(error).__name__}: {error}")


def follow(connection: Connection, make: Callable[[], Any]) -> None:
    """Make this rank's executable, say what it holds, then call of it what rank 0 calls of its own, until CLOSE.

    What goes wrong is reported, and ends it: the other ranks can't go on without this one.
    """
    executable = None
    try:
        executable = make()
        connection.send(executable.cache_bytes)
        while (asked := connection.recv())[0] != CLOSE:
            name, arguments = asked
            getattr(executable, name)(*arguments)
    except (EOFError, ConnectionError):
        return  # rank 0 is gone
    except Exception as error:  # noqa: BLE001 - rank 0 raises it
        if not isinstance(error, SpecRTError):
            traceback.print_exc()
        with suppress(ConnectionError):  # nobody is left to be told
            connection.send(failed(error))
    finally:
        if executable is not None:
            executable.close()


def _end_with(connection: Connection) -> None:
    """End this process when the other end of its pipe is gone, also in the midst of a wait for a rank that is."""
    poll = select.poll()
    poll.register(connection.fileno(), 0)  # nothing but that the other end is closed
    poll.poll()
    os._exit(1)


def main(handle: int) -> None:
    """Do what the first message says: a function, and what it is given behind the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: rank 0 decides what it means
    connection = Connection(handle)
    Thread(target=_end_with, args=(connection,), daemon=True).start()
    function, arguments = connection.recv()
    function(connection, *arguments)


if __name__ == "__main__":
    main(int(sys.argv[1]))
