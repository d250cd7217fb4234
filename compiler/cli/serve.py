"""`specrt serve`: a bundle behind OpenAI's protocol."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from compiler.cli.console import command
from compiler.cli.options import Debug
from compiler.cli.run import build_here
from specs.errors import SpecRTError


@command
def serve_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", show_default=False, help="A compiled bundle.")],
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(show_default="the bundle's", help="What clients call the model.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="SPECRT_API_KEY",
            show_default=False,
            help="Clients must send it; the environment keeps it out of `ps`.",
        ),
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Sequences that may wait; beyond them the answer is 429.")] = 64,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that running requests get after SIGTERM.")] = 60,
    cache_tokens: Annotated[
        int | None, typer.Option(min=1, show_default="what fits", help="Tokens that the KV cache holds.")
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="A line on stderr for each request.")] = False,
    debug: Debug = False,  # noqa: ARG001 (read by @command)
) -> None:
    """Serve a compiled bundle to OpenAI's clients: completions and chats, whole or streamed."""
    import runtime

    try:
        from serve.app import Server
        from serve.process import listen, run
    except ImportError as error:
        hint = "`pip install specrt[serve]`"
        raise SpecRTError("CLI-018", f"`serve` needs `{error.name}`, which is not installed", hint=hint) from error
    build_here(bundle)
    with runtime.load(bundle, cache_tokens=cache_tokens) as model:
        server = Server(model, name=name, api_key=api_key, queue=queue)
        listener = listen(host, port)
        address = f"[{host}]" if ":" in host else host
        told = (
            f"`{server.name}` is served on http://{address}:{listener.getsockname()[1]}/v1; Ctrl-C or SIGTERM ends it"
        )
        run(server, listener, drain=drain, log=log, ready=lambda: print(told, file=sys.stderr, flush=True))
