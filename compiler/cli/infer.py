"""`specrt infer`: the draft of a spec for a checkpoint of an unknown architecture."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compiler.cli.console import command, plural, print_json, stderr, stdout, write_text
from compiler.cli.options import Debug, Json

if TYPE_CHECKING:
    from compiler.infer import Draft


@command
def infer_command(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", show_default=False, help="A folder: config.json and safetensors files."),
    ],
    out: Annotated[Path | None, typer.Option(show_default=False, help="Write the draft here, not to stdout.")] = None,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 (read by @command)
) -> None:
    """Draft a spec for an unknown architecture from config.json and the names and shapes of its tensors."""
    from compiler.infer import infer

    draft = infer(checkpoint)
    if out is not None:
        write_text(out, draft.text)
    commands = _commands(draft, checkpoint, out or Path(f"{draft.name}.yaml"))
    if json:
        print_json(
            {
                "name": draft.name,
                "out": None if out is None else str(out),
                "spec": draft.text,
                "parameters": draft.parameters,
                "layers": draft.layers,
                "tensors": draft.tensors,
                "checks": [{"line": check.line, "about": check.about, "text": check.text} for check in draft.checks],
                "ignored": list(draft.ignored),
                "next": [line for line, _ in commands],
            }
        )
        return
    if out is None:
        print(draft.text, end="")
    _report(draft, checkpoint, out, commands)


def _commands(draft: Draft, checkpoint: Path, path: Path) -> list[tuple[str, str]]:
    """What to run next, and what for."""
    spec, folder = shlex.quote(str(path)), shlex.quote(str(checkpoint))
    bundle = shlex.quote(f"build/{draft.name}")
    return [
        (f"specrt inspect {spec} {folder} --stage built --ir", "read the equations beside the paper or the code"),
        (f"compile {spec} {folder} --out {bundle}", "once the draft says what the model does"),
        (
            f'python -c "import runtime; print(runtime.load({bundle!r}).forward([[1, 2, 3]]))"',
            "the original code's numbers?",
        )
        if draft.encoder
        else (f"specrt run {bundle} --tokens 1,2,3", "the greedy ids must be those of the original code"),
    ]


def _report(draft: Draft, checkpoint: Path, out: Path | None, commands: list[tuple[str, str]]) -> None:
    """What was found and what to check; on stderr where the draft itself is on stdout."""
    from rich.markup import escape
    from rich.table import Table

    from compiler.cli.console import count_text

    console = stderr() if out is None else stdout()
    if out is not None:
        console.print(f"wrote [bold]{escape(str(out))}[/]", soft_wrap=True)
    console.print(
        f"drafted `{draft.name}` from {escape(str(checkpoint))}: {plural(draft.layers, 'layer')}, "
        f"{plural(draft.tensors, 'tensor')}, {count_text(draft.parameters)} parameters; it loads, and "
        + ("every tensor has its place" if not draft.ignored else "[bold red]not every tensor is used[/]"),
        soft_wrap=True,
    )
    for name in draft.ignored:
        console.print(f"  [red]unused[/] {escape(name)}", soft_wrap=True)
    console.print()
    console.print(f"[bold underline]{plural(len(draft.checks), 'thing')} to check[/], by line of the draft")
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(style="cyan", overflow="fold", max_width=24)
    table.add_column(overflow="fold")
    for check in draft.checks:
        table.add_row(str(check.line), escape(check.about), escape(check.text))
    console.print(table)
    console.print()
    console.print("[bold underline]then[/]")
    for line, why in commands:
        console.print(f"  [dim]# {why}[/]\n  {escape(line)}", soft_wrap=True)
