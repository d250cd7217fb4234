"""`specrt inspect`: the graph at any stage as text or picture, the plan, and sizes; of a source or of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compiler.cli.console import bytes_text, command, count_text, is_bundle, plural, print_json, stdout, write_text
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
    SourceOrBundle,
    Target,
    TensorParallel,
    Toolchain,
)
from specs.errors import SpecRTError

if TYPE_CHECKING:
    from compiler.ir import Graph


@command
def inspect_command(
    source: SourceOrBundle,
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
    stage: Annotated[
        str, typer.Option(help="Which graph: built, final, or a pass by number or name.", show_default=True)
    ] = "final",
    ir: Annotated[bool, typer.Option("--ir", help="The graph's text.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="What runs in which order, and the ports.")] = False,
    sizes: Annotated[bool, typer.Option("--sizes", help="Weights by part, KV cache by token.")] = False,
    mermaid: Annotated[bool, typer.Option("--mermaid", help="The graph as Mermaid text, for Markdown.")] = False,
    svg: Annotated[Path | None, typer.Option(show_default=False, help="Draw the graph into this file.")] = None,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 (read by @command)
) -> None:
    """Look inside a model or a bundle. Without flags: what it is, its sizes and its stages."""
    if is_bundle(source):
        given = {
            "CHECKPOINT": checkpoint,
            "--size": size,
            "--target": target,
            "--toolchain": toolchain,
            "--precision": precision,
            "--kv-cache": kv_cache,
            "--max-batch": max_batch,
            "--max-sequence": max_sequence,
            "--tensor-parallel": tensor_parallel,
            "--pipeline-parallel": pipeline_parallel,
        }
        extra = [name for name, value in given.items() if value]
        if extra or stage != "final":
            wrong = ", ".join(f"`{name}`" for name in [*extra, *(["--stage"] if stage != "final" else [])])
            raise SpecRTError(
                "CLI-015", f"{wrong} can't be chosen for a bundle: it is compiled", hint="inspect its source"
            )
        found = _of_bundle(source)
    else:
        options = {
            "checkpoint": checkpoint, "size": size, "target": target, "toolchain": toolchain, "precision": precision,
            "kv_cache": kv_cache, "max_batch": max_batch, "max_sequence": max_sequence,
            "tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel,
        }  # fmt: skip
        found = _of_source(source, stage, plan, options)
    graph: Graph = found.pop("graph")
    summary = not (ir or plan or sizes or mermaid or svg)
    if svg is not None:
        from compiler.draw import svg as draw

        write_text(svg, draw(graph))
        found["svg"] = str(svg)
    if json:
        wanted = {"ir": ir, "mermaid": mermaid, "plan": plan}
        print_json({key: value for key, value in {**found, **_texts(graph, wanted)}.items() if wanted.get(key, True)})
        return
    if mermaid:
        from compiler.draw import mermaid as text

        print(text(graph), end="")
    if ir:
        _show_ir(graph)
    if summary:
        _show_summary(found)
    if sizes or summary:
        _show_sizes(found["sizes"])
    if plan:
        _show_plan(found["plan"])
    if svg is not None:
        stdout().print(f"wrote {svg}", soft_wrap=True, markup=False)


def _texts(graph: Graph, wanted: dict[str, bool]) -> dict[str, str]:
    from compiler.draw import mermaid

    texts = {}
    if wanted["ir"]:
        texts["ir"] = str(graph)
    if wanted["mermaid"]:
        texts["mermaid"] = mermaid(graph)
    return texts


def _of_source(source: Path, stage: str, plan: bool, options: dict[str, Any]) -> dict[str, Any]:
    from compiler.api import prepare
    from compiler.sizes import sizes
    from compiler.stages import stage as find

    prepared = prepare(source, **options)
    at = find(prepared, stage)
    stages = [{"number": 0, "name": "built", "equations": prepared.reports[0].equations_before, "hits": 0}]
    stages += [
        {"number": number, "name": report.name, "equations": report.equations_after, "hits": len(report.hits)}
        for number, report in enumerate(prepared.reports, start=1)
    ]
    found: dict[str, Any] = {
        "kind": "source",
        "name": prepared.source.label,
        "architecture": prepared.source.spec.name,
        "spec": prepared.source.spec.where.file,
        "target": prepared.request.target,
        "precision": prepared.precision.recipe.name,
        "kv_cache": prepared.precision.recipe.kv_cache,
        "role": prepared.role,
        "parameters": prepared.built.parameters,
        "config": dict(prepared.source.config),
        "limits": {"max_batch": prepared.limits.batch, "max_sequence": prepared.limits.sequence},
        "sizes": sizes(prepared).as_dict(),
        "stages": stages,
        "stage": {"number": at.number, "name": at.name},
        "graph": at.graph,
    }
    if plan:
        from compiler.plan import plan_of

        found["plan"] = plan_of(prepared)
    return found


def _of_bundle(path: Path) -> dict[str, Any]:
    from compiler.ir.parser import parse
    from compiler.sizes import graph_sizes
    from runtime.bundle import Bundle

    bundle = Bundle.open(path)
    graph = parse((path / "graph.ir").read_text(encoding="utf-8"))
    limits = bundle.manifest["limits"]
    size = graph_sizes(graph, limits["max_batch"], limits["max_sequence"])
    return {"kind": "bundle", **bundle.manifest, "sizes": size.as_dict(), "plan": bundle.plan, "graph": graph}


# -- showing --------------------------------------------------------------------------------------------------------


def _show_ir(graph: Graph) -> None:
    """The text of a graph; colours only where a terminal shows them, the characters never change."""
    from rich.text import Text

    console = stdout()
    text = str(graph)
    if not console.is_terminal:
        print(text, end="")
        return
    styled = Text(text)
    styled.highlight_regex(r"(?m) @ \S+$", "dim")
    styled.highlight_regex(r"%[\w.]+", "cyan")
    styled.highlight_regex(r"\b(?:f32|f16|bf16|i64|i32|i8|u8|i4|bool)\[[^\]]*\]", "green")
    styled.highlight_regex(r"(?m)(?<== )\w+(?=\()", "bold yellow")
    styled.highlight_regex(r"(?m)^\s*(?:graph|dim|return|yield)\b", "bold magenta")
    styled.highlight_regex(r'"[^"\n]*"', "bright_blue")
    console.print(styled, soft_wrap=True, end="")


def _show_summary(found: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = stdout()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan")
    table.add_column(overflow="fold")
    table.add_row(found["kind"], f"[bold]{escape(str(found['name']))}[/], {count_text(found['parameters'])} parameters")
    origin = found["spec"] if "spec" in found else found["source"]["spec"]
    table.add_row("spec", escape(f"{found['architecture']} ({Path(origin).name})"))
    cache = f", KV cache in {found['kv_cache']}" if found.get("kv_cache") else ""
    target = f"{found['target']} in {found['precision']}{cache}"
    table.add_row("compiled for" if found["kind"] == "bundle" else "for", target)
    limits = found["limits"]
    table.add_row(
        "serves", f"{plural(limits['max_batch'], 'sequence')} at once, each up to {limits['max_sequence']:,} tokens"
    )
    config = ", ".join(f"{key} {value}" for key, value in found["config"].items() if not isinstance(value, dict))
    table.add_row("config", escape(config))
    if "toolchain" in found:
        table.add_row("made by", escape(f"specrt {found['specrt']}, " + _pairs(found["toolchain"])))
        table.add_row("made at", escape(str(found["created"])))
    if "stages" in found:
        names = (f"{at['number']}\u00a0{at['name']}\u00a0[dim]({at['equations']})[/]" for at in found["stages"])
        table.add_row("stages", " → ".join(names))
    console.print(table)
    console.print()


def _pairs(content: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in content.items())


def _show_sizes(found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), header_style="cyan", show_footer=True, footer_style="bold")
    table.add_column("part", footer="all")
    for name, footer in (
        ("layers", ""),
        ("tensors", f"{sum(part['tensors'] for part in found['parts']):,}"),
        ("parameters", f"{found['parameters']:,}"),
        ("bytes", bytes_text(found["weight_bytes"])),
        ("share", ""),
    ):
        table.add_column(name, footer=footer, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for part in found["parts"]:
        share = part["bytes"] / max(found["weight_bytes"], 1)
        layers = "" if part["layers"] is None else f"{part['layers']}"
        bar = "█" * round(share * 10) or ("▏" if share > 0.005 else "")
        table.add_row(
            part["part"], layers, f"{part['tensors']:,}", f"{part['parameters']:,}", bytes_text(part["bytes"]),
            f"{share:.0%}", f"[blue]{bar}[/]",
        )  # fmt: skip
    console = stdout()
    console.print(table)
    if found["cache_bytes_per_token"]:
        most = found.get("cache_bytes_max")
        limit = "" if most is None else f", {bytes_text(most)} with all sequences at their longest"
        console.print(f"  KV cache {bytes_text(found['cache_bytes_per_token'])} a token{limit}")


def _show_plan(plan: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = stdout()
    for title, rows in (("inputs", plan["inputs"]),):
        table = Table(box=None, padding=(0, 2), header_style="cyan")
        for name in (title, "type"):
            table.add_column(name)
        for row in rows:
            table.add_row(escape(row["name"]), escape(f"{row['dtype']}[{','.join(str(dim) for dim in row['shape'])}]"))
        console.print(table)
    stages = {first: number for number, first in enumerate(plan.get("stages", ())) if len(plan["stages"]) > 1}
    for number, step in enumerate(plan["steps"]):
        if number in stages:
            console.print(f"[bold underline]stage {stages[number]} of the pipeline[/]")
        what = escape(step["file"] or step["name"])
        console.print(
            f"[bold]step {number}[/] {escape(step['kind'])} on {escape(step['backend'])} {what}",
            soft_wrap=True,
        )
        for side in ("inputs", "outputs"):
            names = ", ".join(port if port == value else f"{port} = {value}" for port, value in step[side].items())
            console.print(f"  [cyan]{side}[/] {escape(names)}", soft_wrap=True)
    outputs = ", ".join(f"{name} = {value}" for name, value in plan["outputs"].items())
    console.print(f"[bold]outputs[/] {escape(outputs)}", soft_wrap=True)
    cache = plan.get("cache")
    if cache:
        layers = cache["layers"]
        one = (
            f", each K and V of {layers[0]['heads']} heads × {layers[0]['dim']} in {layers[0]['dtype']}"
            if layers
            else ""
        )
        linear = cache.get("kind") == "linear"
        each = "one row for each sequence, of" if linear else "in blocks of"
        console.print(
            f"[bold]cache[/] {plural(len(layers), 'layer')} {each} {cache['block_size']} tokens{one}",
            soft_wrap=True,
        )
