"""`specrt doctor`: what this machine has, and whether a bundle loads here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compiler.cli.console import MISTAKE, bytes_text, command, print_json, stdout
from compiler.cli.options import Debug, Json
from specs.errors import SpecRTError

if TYPE_CHECKING:
    from compiler.doctor import Machine


@command
def doctor_command(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="[BUNDLE]", show_default=False, help="A bundle that should load here.")
    ] = None,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 (read by @command)
) -> None:
    """Show what this machine has that matters, and why a bundle does or does not load here."""
    from compiler.cli.check import check_bundle
    from compiler.doctor import examine

    machine = examine()
    checks = None if bundle is None else check_bundle(bundle)
    problems = _problems(machine)
    if json:
        content: dict[str, Any] = {**machine.as_dict(), "problems": problems}
        if checks is not None:
            content["bundle"] = {"path": str(bundle), **checks.as_dict()}
        print_json(content)
    else:
        _show(machine, problems)
        if checks is not None:
            _show_checks(str(bundle), checks.steps, checks.error)
    if problems or (checks is not None and checks.error is not None):
        raise typer.Exit(MISTAKE)


def _problems(machine: Machine) -> list[str]:
    from compiler.doctor import missing_packages

    return [
        f"`{name}` is not installed: run `make demo`, or `pip install specrt`" for name in missing_packages(machine)
    ]


def _show(machine: Machine, problems: list[str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    table.add_row("specrt", machine.specrt)
    table.add_row("python", escape(machine.python))
    table.add_row("system", escape(machine.system))
    for name, found in machine.packages.items():
        table.add_row(name, found or "[red]not installed[/]")
    table.add_row("cpu", f"{escape(machine.cpu.name)}, {machine.cpu.cores} cores for this process")
    table.add_row("", _features(machine))
    if machine.memory_bytes is not None:
        limit = machine.memory_limit_bytes
        limited = "" if limit is None else f", of which this container may use {bytes_text(limit)}"
        table.add_row("memory", bytes_text(machine.memory_bytes) + limited)
    for gpu in machine.gpus:
        table.add_row("gpu", f"{escape(gpu.name)}, {gpu.memory}, driver {gpu.driver}, compute {gpu.compute}")
    if machine.gpu_note is not None:
        table.add_row("gpu", f"[dim]none: {escape(machine.gpu_note)}[/]")
    table.add_row("tensorrt", machine.tensorrt or "[dim]not installed; the cpu target does not need it[/]")
    if machine.nccl is not None or len(machine.gpus) > 1:
        table.add_row("nccl", machine.nccl or "[dim]not installed; several GPUs need it: `pip install specrt[nccl]`[/]")
    console = stdout()
    console.print(table)
    for problem in problems:
        console.print(f"[bold red]problem[/] {escape(problem)}", soft_wrap=True)


def _features(machine: Machine) -> str:
    from compiler.doctor import CPU_FEATURES

    if machine.cpu.features is None:
        return "[dim]this system does not list CPU features[/]"
    return "\n".join(
        f"[green]✓[/] {flag}: {CPU_FEATURES[flag]}" if there else f"[dim]✗ {flag}: {CPU_FEATURES[flag]}[/]"
        for flag, there in machine.cpu.features.items()
    )


def _show_checks(path: str, steps: list[tuple[str, str]], error: SpecRTError | None) -> None:
    from rich.markup import escape

    from compiler.cli.console import styled_error

    console = stdout()
    console.print()
    console.print(f"[bold]{escape(path)}[/]", soft_wrap=True)
    for name, found in steps:
        console.print(f"  [green]✓[/] {name}: {escape(found)}", soft_wrap=True)
    if error is not None:
        console.print(styled_error(str(error)), soft_wrap=True)
