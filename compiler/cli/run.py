"""`specrt run`: a prompt in, text out as it comes, and how fast."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compiler.cli.console import command
from compiler.cli.options import Debug, Json

if TYPE_CHECKING:
    pass


@command
def run_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", show_default=False, help="A compiled bundle.")],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", show_default=False, help="The text to go on from; else read from stdin."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(show_default=False, help="Token ids instead of text: 1,2,3. Prints ids.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after so many.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, show_default=False, help="Sample from the k likeliest.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, show_default=False, help="Sample from the likeliest that sum to p."),
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(min=0.0, help="Above 1: avoid what was said.")] = 1.0,
    seed: Annotated[int | None, typer.Option(show_default=False, help="The same seed gives the same text.")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(show_default="the bundle's", help="A token id to stop at, or `none`; may be repeated."),
    ] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print while it is generated.")] = True,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text with a compiled bundle."""
