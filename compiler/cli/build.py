"""`specrt build`: the engines of a GPU bundle, where its GPU is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compiler.cli.console import bytes_text, command, plural, print_json, stdout
from compiler.cli.options import Debug, Json


@command
def build_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", show_default=False, help="A bundle compiled for a GPU.")],
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 (read by @command)
) -> None:
    """Build the TensorRT engines of a bundle for this machine's GPU; those in the cache are taken from there.

    `specrt run` does the same before it loads. The cache is ~/.cache/specrt, or $SPECRT_CACHE.
    """
    from rich.markup import escape

    from compiler.cli.progress import Stages
    from compiler.lower.tensorrt.plans import build_bundle
    from runtime.bundle import Bundle

    opened = Bundle.open(bundle)
    with Stages("read the bundle", quiet=json) as stages:
        plans = build_bundle(opened.path, progress=stages.report)
    if json:
        print_json({"bundle": str(bundle), "engines": [plan.as_dict() for plan in plans]})
        return
    console = stdout()
    for plan in plans:
        how = "from the cache" if plan.cached else f"{plan.seconds:.1f} s"
        console.print(f"  {escape(plan.path.name)}  {bytes_text(plan.bytes)}  [dim]{how}[/]", soft_wrap=True)
    place = escape(str(plans[0].path.parent)) if plans else "it needs none: it is for the CPU"
    console.print(f"{plural(len(plans), 'engine')} [bold]{place}[/]", soft_wrap=True)
