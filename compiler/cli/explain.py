"""`specrt explain`: what was fused or not, what the backend does with each operation, which precision, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compiler.cli.console import command, place_text, print_json, stdout
from compiler.cli.options import (
    CheckpointArgument,
    Debug,
    Json,
    KvCache,
    MaxBatch,
    MaxSequence,
    PipelineParallel,
    Precision,
    Size,
    Source,
    Target,
    TensorParallel,
    Toolchain,
)

if TYPE_CHECKING:
    from rich.console import Console

    from compiler.explain import Explanation

_VERDICTS = {"emit": "green", "decompose": "yellow", "unsupported": "bold red"}


@command
def explain_command(
    source: Source,
    checkpoint: CheckpointArgument = None,
    size: Size = None,
    target: Target = None,
    toolchain: Toolchain = None,
    precision: Precision = None,
    kv_cache: KvCache = None,
    max_batch: MaxBatch = None,
    max_sequence: MaxSequence = None,
    tensor_parallel: TensorParallel = None,
    pipeline_parallel: PipelineParallel = None,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 (read by @command)
) -> None:
    """Tell why: fusions, the backend's answer for each operation, precision. Needs no weights, only shapes."""
    from compiler.api import prepare
    from compiler.explain import explain

    prepared = prepare(
        source,
        checkpoint,
        size=size,
        target=target,
        toolchain=toolchain,
        precision=precision,
        kv_cache=kv_cache,
        max_batch=max_batch,
        max_sequence=max_sequence,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
    )
    found = explain(prepared)
    if json:
        print_json(found.as_dict())
    else:
        _show(found)


def _show(found: Explanation) -> None:
    from rich.markup import escape

    console = stdout()
    console.print(
        f"[bold]{escape(found.name)}[/] for {found.target} in {found.precision}, as {found.role}", soft_wrap=True
    )
    _heading(console, "why this spec, this role, this precision")
    for fact in found.facts:
        place = f" [dim]{escape(place_text(fact.where))}[/]" if fact.where else ""
        console.print(f"  [cyan]{escape(fact.subject)}[/] {escape(fact.text)}{place}", soft_wrap=True)
    _heading(console, "passes")
    for item in found.passes:
        changed = f"{item.equations_before} → {item.equations_after} equations"
        console.print(f"  [bold]{item.name}[/] [dim]{changed}[/]", soft_wrap=True)
        for hit in item.hits:
            console.print(f"    [green]✓[/] {escape(_at(hit))}", soft_wrap=True)
        for refusal in item.refusals:
            console.print(
                f"    [red]✗[/] {escape(_at(refusal))}\n      {escape(str(refusal['reason']))}", soft_wrap=True
            )
    _heading(console, f"operations on {found.target}")
    _show_operations(console, found)


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(f"[bold underline]{text}[/]")


def _at(event: dict[str, Any]) -> str:
    place = f"  {place_text(event['where'])}" if event["where"] else ""
    times = f" × {event['times']}" if event.get("times", 1) != 1 else ""
    return f"{event['rule']} at %{event['at']}{times}{place}"


def _show_operations(console: Console, found: Explanation) -> None:
    """Operations that need no word on one line, then one by one those with a reason."""
    from rich.markup import escape

    plain = [item for item in found.operations if item.answer == "emit" and not item.reason]
    if plain:
        names = ", ".join(f"{item.op} × {item.times}" for item in plain)
        console.print(f"  [green]emit[/] as they are: {names}", soft_wrap=True)
    for item in found.operations:
        if item.answer != "emit" or item.reason:
            place = f"  [dim]{escape(place_text(item.where))}[/]" if item.where else ""
            console.print(
                f"  [{_VERDICTS[item.answer]}]{item.answer}[/] [bold]{item.op}[/] × {item.times} in "
                f"{', '.join(item.dtypes)}{place}\n      {escape(item.reason)}",
                soft_wrap=True,
            )
