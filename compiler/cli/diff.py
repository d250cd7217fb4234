"""`specrt diff`: how two architectures differ, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from compiler.cli.console import command, place_text, plural, print_json, stdout
from compiler.cli.options import Debug, Json

if TYPE_CHECKING:
    from specs.compare import Difference, Side
    from specs.facts import Fact

_HELP = "An architecture file, `file.yaml:size`, or a checkpoint folder."


@command
def diff_command(
    a: Annotated[str, typer.Argument(metavar="A", show_default=False, help=_HELP)],
    b: Annotated[str, typer.Argument(metavar="B", show_default=False, help="Another one.")],
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 (read by @command)
) -> None:
    """Say how two architectures differ: wiring, parts, stored weights, sizes. Values where both have them."""
    from specs.compare import compare, side

    left, right = side(a), side(b)
    differences, same = compare(left, right)
    if json:
        print_json(
            {
                "a": {"name": left.name, "spec": left.spec.where.file},
                "b": {"name": right.name, "spec": right.spec.where.file},
                "differences": [{"group": d.group, "what": d.what, "a": d.a, "b": d.b} for d in differences],
                "same": [{"group": fact.group, "what": fact.what, "text": fact.text} for fact in same],
            }
        )
    else:
        _show(left, right, differences, same)


def _show(a: Side, b: Side, differences: list[Difference], same: list[Fact]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = stdout()
    names = (a.name, b.name) if a.name != b.name else (f"{a.name} (A)", f"{b.name} (B)")
    for name, side in zip(names, (a, b), strict=True):
        console.print(f"[bold]{escape(name)}[/] [dim]{escape(place_text(side.spec.where.file))}[/]", soft_wrap=True)
    table = Table(box=None, padding=(0, 1), header_style="bold", expand=False)
    table.add_column("", style="cyan", max_width=24)
    for name in names:
        table.add_column(escape(name), overflow="fold", ratio=1)
    group = None
    for one in differences:
        if one.group != group:
            table.add_row("", "", "")
            group = one.group
            if one.what:
                table.add_row(f"[bold underline]{escape(group)}[/]", "", "")
        label = f"  {escape(one.what)}" if one.what else f"[bold underline]{escape(group)}[/]"
        table.add_row(label, *(_cell(text) for text in (one.a, one.b)))
    if differences:
        console.print(table)
    console.print()
    console.print(f"[bold]{plural(len(differences), 'difference')}[/]; they are alike in")
    for group in dict.fromkeys(fact.group for fact in same):
        whats = ", ".join(fact.what for fact in same if fact.group == group)
        console.print(f"  [dim]{escape(group)}: {escape(whats)}[/]", soft_wrap=True)
    if a.env is None or b.env is None:
        console.print("[dim]Values are compared where both are checkpoints or `file.yaml:size`.[/]")


def _cell(text: str | None) -> str:
    from rich.markup import escape

    return "[dim]-[/]" if text is None else escape(text)
