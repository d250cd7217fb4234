"""What every command shares: how mistakes are shown, exit codes, signals, JSON, and number formats."""

from __future__ import annotations

import functools
import json as json_module
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import typer

from specs.errors import SpecRTError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

MISTAKE, INTERNAL, INTERRUPTED = 1, 70, 130  # 2, wrong usage, is typer's
_TERMINATING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

F = TypeVar("F", bound=Callable[..., None])


def command(function: F) -> F:
    """A command that renders mistakes, exits with the codes of docs/cli.md, and cleans up when it is killed."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        debug = bool(kwargs.get("debug")) or os.environ.get("SPECRT_DEBUG", "0") not in ("", "0")
        try:
            with _signals_as_exits():
                function(*args, **kwargs)
                sys.stdout.flush()
        except SpecRTError as error:
            if debug:
                _print_traceback()
            show_mistake(error, as_json=bool(kwargs.get("json")))
            raise typer.Exit(MISTAKE) from None
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            print("interrupted; nothing was left behind", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # `| head` has seen enough; Python would complain again when it flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(128 + signal.SIGPIPE) from None
        except Exception as error:  # noqa: BLE001 (the last place: a bug must not end in a page of traceback)
            if debug:
                _print_traceback()
            show_internal(error, debug=debug)
            raise typer.Exit(INTERNAL) from None

    return cast(F, wrapper)


def _print_traceback() -> None:
    import traceback

    traceback.print_exc()


@contextmanager
def _signals_as_exits() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process as an exception, so that what was half written is removed."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    try:
        before = {number: signal.signal(number, leave) for number in _TERMINATING}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_mistake(error: SpecRTError, *, as_json: bool) -> None:
    """A mistake: coloured text on stderr, or `{"error": ...}` on stdout."""
    if as_json:
        print_json({"error": error.as_dict()})
    else:
        stderr().print(styled_error(str(error)), soft_wrap=True)


def styled_error(text: str) -> Text:
    """The text of an error with its parts coloured; the characters stay the same."""
    from rich.text import Text

    styled = Text(text)
    styled.highlight_regex(r"^error\[[A-Z]+-\d+\]:", "bold red")
    styled.highlight_regex(r"(?m)^\s+-->", "bold blue")
    styled.highlight_regex(r"(?m)^hint:", "bold green")
    styled.highlight_regex(r"`[^`\n]*`", "bold")
    return styled


def show_internal(error: Exception, *, debug: bool) -> None:
    """A bug of ours, in two lines."""
    first = (str(error).splitlines() or [""])[0]
    print(f"internal error: {type(error).__name__}: {first}", file=sys.stderr)
    again = "the text above" if debug else "what the same command prints with `--debug`"
    print(f"This is a bug in SpecRT. Please report it with {again} and with `specrt doctor --json`.", file=sys.stderr)


def stdout() -> Console:
    """The console for what was asked for."""
    from rich.console import Console

    return Console(highlight=False)


def stderr() -> Console:
    """The console for errors and progress."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_json(content: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json_module.dumps(content, indent=2, ensure_ascii=False, default=str))


def write_text(path: Path, text: str) -> None:
    """Write a file that the user named; raises SpecRTError CLI-012 where that is not possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = (
            f"`{path.parent}` is no folder"
            if isinstance(error, (FileExistsError, NotADirectoryError))
            else error.strerror
        )
        raise SpecRTError(
            "CLI-012", f"can't write `{path}`: {reason}", hint="name a file that you may write"
        ) from error


def is_bundle(path: Path) -> bool:
    """Whether a folder is a compiled bundle (has a `bundle.json`)."""
    return (path / "bundle.json").is_file()


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 layer`, `2 layers`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def bytes_text(size: float) -> str:
    """`834 B`, `22.4 MB`: powers of ten, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def count_text(number: float) -> str:
    """`5.48M`, `6.74B`: three digits."""
    for unit in ("", "K", "M"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}B"


def place_text(place: object) -> str:
    """A place in a file, relative to the working directory where it lies below it."""
    text = str(place)
    here = os.getcwd() + os.sep
    return text[len(here) :] if text.startswith(here) else text
