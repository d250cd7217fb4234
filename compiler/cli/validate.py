"""`specrt validate`: the matrix of models, precisions, GPUs and toolchains as a report; or the first divergence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compiler.cli.console import command, print_json, stdout, write_text
from compiler.cli.options import Debug, Json
from specs.errors import SpecRTError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compiler.validate.matrix import Choice, Model
    from compiler.validate.report import Report
    from compiler.validate.trace import Trace

Names = Annotated[str, typer.Option(help="`all`, or names with commas.")]


@command
def validate_command(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[SOURCE]...", show_default=False, help="Architecture files or checkpoint folders."),
    ] = None,
    models: Annotated[
        str | None, typer.Option(show_default=False, help="`all` specs that come with SpecRT, or names with commas.")
    ] = None,
    matrix: Annotated[
        str | None,
        typer.Option(show_default=False, help="Rows, precisions and GPUs of another system's matrix (specs/matrices)."),
    ] = None,
    size: Annotated[
        str | None, typer.Option(show_default="tiny", help="Which size of an architecture file gets random weights.")
    ] = None,
    precisions: Annotated[str | None, typer.Option(show_default="all", help="`all`, or names with commas.")] = None,
    gpus: Annotated[str | None, typer.Option(show_default="all", help="`all`, or names with commas.")] = None,
    toolchains: Names = "all",
    text: Annotated[
        Path | None,
        typer.Option(show_default="random ids", help="What checkpoints are judged on: a text, or ids in a .npy."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(show_default=False, help="What recipes are calibrated on: a text, or ids in a .npy.")
    ] = None,
    evidence: Annotated[
        Path | None,
        typer.Option(show_default=False, help="A folder with records of networks emitted and runs on GPUs."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the report goes.")] = Path("build/report"),
    jobs: Annotated[int | None, typer.Option(min=1, show_default="cores", help="Processes at a time.")] = None,
    ray: Annotated[str | None, typer.Option(show_default=False, help="Address of a Ray cluster to work on.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE", show_default=False, help="Compare this bundle with SOURCE, value by value, instead."
        ),
    ] = None,
    tokens: Annotated[str | None, typer.Option(show_default="random ids", help="The prompt of --trace: 1,2,3.")] = None,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 (read by @command)
) -> None:
    """Say how well each precision computes what a model means, where it runs, and how that is known."""
    given = list(sources or [])
    if trace is not None:
        _trace(trace, given, size, tokens, json)
        return
    rows = _rows(given, models, size, text, calibration)
    title = "SpecRT precision matrix"
    if matrix is not None:
        from compiler.validate.models import models_of_matrix
        from specs.matrix import load_matrix

        theirs = load_matrix(matrix)
        rows += models_of_matrix(theirs)
        title = theirs.title_text
        precisions, gpus = precisions or ",".join(theirs.precisions), gpus or ",".join(theirs.gpus)
    if not rows:
        raise SpecRTError("VAL-007", "no model is named", hint="give sources, or `--models all`")
    choice = _choice(precisions or "all", gpus or "all", toolchains)
    report = _report(rows, choice, evidence, out, jobs, ray, title, quiet=json)
    content = _write(report, out)
    if json:
        print_json({"out": str(out), "totals": report.totals(), "report": content})
    else:
        _show(report, out)


def _rows(
    given: Sequence[Path], models: str | None, size: str | None, text: Path | None, calibration: Path | None
) -> list[Model]:
    from compiler.validate.models import all_models, model_of

    found = [model_of(path, size, text, calibration) for path in given]
    if models is not None:
        known = {model.name: model for model in all_models()}
        found += [known[name] for name in names_of("--models", models, tuple(known))]
    return found


def _choice(precisions: str, gpus: str, toolchains: str) -> Choice:
    from compiler.validate.matrix import Choice
    from specs.hardware import gpu_names, toolchain_names
    from specs.precision import recipe_names

    return Choice(
        names_of("--precisions", precisions, recipe_names()),
        names_of("--gpus", gpus, gpu_names()),
        names_of("--toolchains", toolchains, tuple(name for name in toolchain_names() if name != "openvino")),
    )


def names_of(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """`all` of the known names, or those that are listed; raises SpecRTError VAL-007 for an unknown one."""
    if text == "all":
        return known
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in known:
            raise SpecRTError("VAL-007", f"`{option}` does not know `{name}`", hint=f"known: all, {', '.join(known)}")
    return names


def _report(
    models: Sequence[Model], choice: Choice, evidence: Path | None, out: Path, jobs: int | None, ray: str | None,
    title: str, *, quiet: bool,
) -> Report:  # fmt: skip
    from compiler.cli.progress import Stages
    from compiler.validate.matrix import assemble
    from compiler.validate.records import read_records
    from compiler.validate.run import emulate_all

    records = [] if evidence is None else list(read_records(evidence))
    with Stages("emulate", quiet=quiet) as stages:
        emulated = emulate_all(models, choice.precisions, out / "cells", jobs=jobs, ray=ray, progress=stages.report)
        stages.say("put the report together")
        return assemble(models, choice, emulated, records, " ".join(["specrt", *sys.argv[1:]]), title)


def _write(report: Report, out: Path) -> dict[str, Any]:
    import json

    from compiler.validate.html import page
    from compiler.validate.report import markdown

    content = report.as_dict()
    write_text(out / "report.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "report.md", markdown(content))
    write_text(out / "index.html", page(content))
    return content


def _show(report: Report, out: Path) -> None:
    from rich.table import Table

    from compiler.validate.report import LEVELS

    totals = report.totals()
    table = Table(box=None, pad_edge=False)
    table.add_column("level")
    table.add_column("model × precision", justify="right")
    table.add_column("")
    for level in reversed(LEVELS):
        table.add_row(level.title, str(totals[level.name]), level.meaning)
    console = stdout()
    console.print(table)
    console.print(f"report  {out}/index.html, report.json, report.md", soft_wrap=True)


# -- the first divergence ---------------------------------------------------------------------------------------------


def _trace(bundle: Path, given: Sequence[Path], size: str | None, tokens: str | None, as_json: bool) -> None:
    import compiler
    from compiler.api import weights_of
    from compiler.cli.run import ids_of
    from compiler.validate.expect import rows_for, rules_of
    from compiler.validate.trace import trace

    if not 1 <= len(given) <= 2:
        hint = "specrt validate --trace BUNDLE CHECKPOINT, or SPEC.yaml CHECKPOINT"
        raise SpecRTError("VAL-007", f"`--trace` compares with one source, {len(given)} are given", hint=hint)
    source, *checkpoint = given
    weights = None if checkpoint or source.is_dir() else "random"
    prepared = compiler.prepare(source, *checkpoint, size=size, weights=weights, precision="fp32")
    row = rows_for(prepared)[0] if tokens is None else ids_of("--tokens", tokens)
    further = {name: rule.apply(name, row) for name, rule in rules_of(prepared).items()}
    found = trace(bundle, prepared.graph, weights_of(prepared), row, further)
    if as_json:
        print_json(_trace_json(bundle, found))
    else:
        _show_trace(found)
    if found.first is not None:
        raise typer.Exit(1)


def _trace_json(bundle: Path, found: Trace) -> dict[str, Any]:
    def line(step: Any) -> dict[str, Any]:
        return {
            "value": step.value, "op": step.op, "where": step.place, "relative": step.error.relative,
            "max_abs": step.error.max_abs, "bound": step.bound,
        }  # fmt: skip

    first = found.first
    return {
        "bundle": str(bundle),
        "first": None if first is None else line(first),
        "values": [line(step) for step in found.steps],
        "skipped": found.skipped,
    }


def _show_trace(found: Trace) -> None:
    from rich.table import Table

    from compiler.cli.console import place_text

    console = stdout()
    first = found.first
    steps = found.steps
    if first is None:
        worst = max(steps, key=lambda step: step.error.relative / step.bound)
        console.print(f"all {len(steps)} values are within their bounds; nearest to its own is {worst.value}")
        steps = (worst,)
    else:
        at = steps.index(first)
        console.print(f"[bold red]first divergence[/]: {first.value}, value {at + 1} of {len(steps)}")
        console.print(f"  --> {place_text(first.place)}", soft_wrap=True)
        steps = steps[max(0, at - 3) : at + 4]
    table = Table(box=None, pad_edge=False)
    for name in ("value", "operation", "relative error", "bound"):
        table.add_column(name, justify="right" if name in ("relative error", "bound") else "left")
    for step in steps:
        style = "" if step.within else "red"
        table.add_row(step.value, step.op, f"{step.error.relative:.1e}", f"{step.bound:.1e}", style=style)
    console.print(table)
