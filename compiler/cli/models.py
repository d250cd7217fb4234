"""`specrt models`: the architectures that there are specs for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compiler.cli.console import command, count_text, place_text, plural, print_json, stdout
from compiler.cli.options import Debug, Json

if TYPE_CHECKING:
    from specs.schema import Spec


@command
def models_command(
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 (read by @command)
) -> None:
    """List the specs: which checkpoints each is for, what it is made of, its published sizes."""
    from specs.match import spec_files
    from specs.schema import load_spec

    found = [_model(load_spec(path)) for path in spec_files()]
    if json:
        print_json({"models": found})
    else:
        _show(found)


def _model(spec: Spec) -> dict[str, Any]:
    from dataclasses import asdict

    from specs.summary import summary

    return {
        "name": spec.name,
        "spec": spec.where.file,
        "model_type": list(spec.match.model_type),
        "when": spec.match.when.text if spec.match.when else None,
        **asdict(summary(spec)),
        "sizes": {name: size.parameters for name, size in spec.sizes.items()},
    }


def _show(models: list[dict[str, Any]]) -> None:
    from pathlib import Path

    from rich.markup import escape
    from rich.table import Table

    console = stdout()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for model in models:
        sizes = ", ".join(f"{name} [dim]{count_text(count)}[/]" for name, count in model["sizes"].items())
        when = f" [dim]when {escape(model['when'])}[/]" if model["when"] else ""
        table.add_row(escape(model["name"]), "for", escape(" or ".join(model["model_type"])) + when)
        table.add_row("", "layers", escape(f"{model['attention']}, {model['positions']}; MLP {model['mlp']}"))
        table.add_row("", "norms", escape(model["norms"]))
        table.add_row("", "sizes", sizes or "none")
    console.print(table)
    folder = place_text(Path(models[0]["spec"]).parent) if models else ""
    console.print()
    console.print(f"{plural(len(models), 'spec')} in {escape(folder)}", soft_wrap=True)
