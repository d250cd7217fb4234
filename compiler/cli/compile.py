"""`specrt compile`: a model in, a bundle out, and what was made of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compiler.cli.console import bytes_text, command, count_text, plural, print_json, stdout
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
    from compiler.api import Prepared


@command
def compile_command(
    source: Source,
    checkpoint: CheckpointArgument = None,
    size: Size = None,
    target: Target = None,
    toolchain: Toolchain = None,
    precision: Precision = None,
    kv_cache: KvCache = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The bundle's folder.", show_default="build/NAME-TARGET-PRECISION"),
    ] = None,
    max_batch: MaxBatch = None,
    max_sequence: MaxSequence = None,
    tensor_parallel: TensorParallel = None,
    pipeline_parallel: PipelineParallel = None,
    weights: Annotated[
        str | None,
        typer.Option(help="checkpoint, or random: for speed without a checkpoint.", show_default="checkpoint"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random weights.", show_default="0")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(show_default=False, help="Token ids (.npy) or text, for the precisions that look at data."),
    ] = None,
    dump: Annotated[
        Path | None, typer.Option(show_default=False, help="A folder for the graph after each pass, NN_pass.ir.")
    ] = None,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 (read by @command)
) -> None:
    """Compile a model written as data into a bundle that runs.

    A checkpoint folder is enough, its config.json finds the spec: [bold]compile path/to/checkpoint[/bold]
    """
    from compiler.api import compile_prepared, prepare_request, request, settled
    from compiler.cli.progress import Stages

    start = time.perf_counter()
    asked = request(
        source, checkpoint=checkpoint, size=size, target=target, toolchain=toolchain, precision=precision,
        kv_cache=kv_cache, out=out, max_batch=max_batch, max_sequence=max_sequence, tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel, weights=weights, seed=seed, calibration=calibration,
    )  # fmt: skip
    with Stages("read the spec and run the passes", quiet=json) as stages:
        prepared = prepare_request(asked, dump)
        stages.say("load PyTorch and the backend")
        prepared = settled(prepared, stages.report)
        path = compile_prepared(prepared, stages.report)
    total = time.perf_counter() - start
    seconds = {**prepared.seconds, **stages.seconds()}
    seconds |= {"other": max(total - sum(seconds.values()), 0.0), "total": total}
    summary = summarize(prepared, path, seconds)
    if json:
        print_json(summary)
    else:
        _show(summary, dump)


def summarize(prepared: Prepared, path: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """What `compile --json` prints."""
    from compiler.passes.runner import count_equations
    from compiler.precision.lints import lints
    from compiler.sizes import sizes

    size = sizes(prepared)
    files = {
        item.relative_to(path).as_posix(): item.stat().st_size for item in sorted(path.rglob("*")) if item.is_file()
    }
    return {
        "bundle": str(path),
        "name": prepared.source.label,
        "architecture": prepared.source.spec.name,
        "spec": prepared.source.spec.where.file,
        "target": prepared.request.target,
        "precision": prepared.precision.recipe.name,
        "kv_cache": prepared.precision.recipe.kv_cache,
        "role": prepared.role,
        "parameters": size.parameters,
        "layers": prepared.source.config.get("layers"),
        "equations": {"built": count_equations(prepared.built.graph), "final": count_equations(prepared.graph)},
        "fusions": fusions(prepared),
        "limits": {"max_batch": prepared.limits.batch, "max_sequence": prepared.limits.sequence},
        "gates": prepared.request.card,
        "beware": [lint.text for lint in lints(prepared)],
        "weight_bytes": size.weight_bytes,
        "cache_bytes_per_token": size.cache_bytes_per_token,
        "bundle_bytes": sum(files.values()),
        "files": files,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "run": _run_line(prepared, path),
    }


def fusions(prepared: Prepared) -> dict[str, dict[str, int]]:
    """For each fusion pass how often a rule fired, and how often one was refused."""
    return {
        report.name: {"hits": len(report.hits), "refused": len(report.refusals)}
        for report in prepared.reports
        if report.name.startswith("fuse_")
    }


def _run_line(prepared: Prepared, path: Path) -> str:
    if prepared.role == "encoder":
        return f"specrt inspect {path}"
    has_tokenizer = (path / "tokenizer.json").is_file()
    return f"specrt run {path} " + ('--prompt "..."' if has_tokenizer else "--tokens 1,2,3")


def _show(summary: dict[str, Any], dump: Path | None) -> None:
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table

    console = stdout()
    layers = "" if summary["layers"] is None else f", {plural(summary['layers'], 'layer')}"
    console.print(
        f"[bold green]compiled[/] [bold]{escape(summary['name'])}[/]: "
        f"{count_text(summary['parameters'])} parameters{layers}, for {summary['target']} in {summary['precision']}",
        soft_wrap=True,
    )
    equations = summary["equations"]
    told = {
        "spec": f"`{summary['architecture']}` from {Path(summary['spec']).name}",
        "build": plural(equations["built"], "equation"),
        "passes": f"{plural(equations['final'], 'equation')} left; {_fused(summary['fusions'])}",
        "write": bytes_text(summary["bundle_bytes"]),
        "other": "loading PyTorch and the backend, hashing",
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan")
    table.add_column(justify="right")
    table.add_column(style="dim", overflow="fold")
    for name, value in summary["seconds"].items():
        if name != "total":
            table.add_row(name, f"{value:.2f} s", told.get(name, ""))
    table.add_row("total", f"[bold]{summary['seconds']['total']:.2f} s[/]", "")
    console.print(Padding(table, (0, 0, 0, 2)))
    limits = summary["limits"]
    cache = f" in {summary['kv_cache']}" if summary["kv_cache"] else ""
    console.print(
        f"serves {plural(limits['max_batch'], 'sequence')} at once, each up to {limits['max_sequence']:,} tokens; "
        f"KV cache{cache} {bytes_text(summary['cache_bytes_per_token'])} a token",
        soft_wrap=True,
    )
    if summary["gates"] is not None:
        for line in _gates(summary["gates"]):
            console.print(line, soft_wrap=True)
    for text in summary["beware"]:
        console.print(f"[yellow]beware[/]   {escape(text)}", soft_wrap=True)
    if dump is not None:
        console.print(f"graphs   {escape(str(dump))}/", soft_wrap=True)
    console.print(
        f"bundle   [bold]{escape(summary['bundle'])}[/] ({bytes_text(summary['bundle_bytes'])})", soft_wrap=True
    )
    console.print(f"next     [bold]{escape(summary['run'])}[/]", soft_wrap=True)


def _gates(card: dict[str, Any]) -> list[str]:
    """What holds, and which linears it took."""
    before, after = card["without"], card["with"]
    told = ", ".join(f"{key.replace('_', ' ')} {before[key]:.3g} → {after[key]:.3g}" for key in card["limits"])
    kept = card["kept"]
    if not kept:
        return [f"gates    hold: {told}"]
    names = ", ".join(kept[:6]) + (f" and {len(kept) - 6} more" if len(kept) > 6 else "")
    return [f"gates    hold with {len(kept)} of {card['of']} linears left as they are: {told}", f"         {names}"]


def _fused(found: dict[str, dict[str, int]]) -> str:
    parts = [f"{name.removeprefix('fuse_')} × {counts['hits']}" for name, counts in found.items() if counts["hits"]]
    missed = sum(counts["refused"] for counts in found.values())
    text = "fused " + (", ".join(parts) or "nothing")
    return text + (f"; {missed} refused (see `specrt explain`)" if missed else "")
