"""`specrt fit`: which GPUs and precisions hold a model, the cheapest first; or what one GPU holds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compiler.cli.console import bytes_text, command, print_json, stdout
from compiler.cli.options import CheckpointArgument, Debug, Json, KvCache, Size, Source
from specs.errors import SpecRTError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compiler.api import Prepared
    from compiler.ir import Graph
    from compiler.validate.fit import Part
    from compiler.validate.load import Sizes


@command
def fit_command(
    source: Source,
    checkpoint: CheckpointArgument = None,
    size: Size = None,
    gpu: Annotated[
        str | None, typer.Option(show_default="every part", help="A part (h100-sxm) or a generation (sm90).")
    ] = None,
    precisions: Annotated[str, typer.Option(help="`all`, or names with commas.")] = "all",
    kv_cache: KvCache = None,
    toolchain: Annotated[str, typer.Option(help="The toolchain that must be able to build it.")] = "tensorrt-10.8",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens in each sequence.", show_default="the model's context")
    ] = None,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs that share each product, with commas.")] = "1,2,4,8",
    prices: Annotated[
        Path | None,
        typer.Option(show_default="GB of memory", help="A YAML file of `part: price`, to rank by in place of memory."),
    ] = None,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 (read by @command)
) -> None:
    """Say what holds a model under a load, and how fast it can decode at best (roofline from datasheets)."""
    from compiler.api import prepare
    from compiler.cli.validate import names_of
    from compiler.validate.fit import decode, fit, holds
    from specs.precision import load_caches, recipe_names

    if kv_cache is not None and kv_cache not in load_caches():
        hint = f"known: {', '.join(load_caches())}"
        raise SpecRTError("CLI-010", f"unknown kv_cache `{kv_cache}`", hint=hint)
    prepared = prepare(source, checkpoint, size=size)
    tokens = context or prepared.limits.sequence
    ranked = _prices(prices)
    rows: list[dict[str, Any]] = []
    ranks = _ranks(prepared, gpus)
    for part, sm, memory_gb in _parts(gpu):
        for name in names_of("--precisions", precisions, recipe_names()):
            for count, rank in ranks.items():
                sizes = _sizes(prepared, rank, name, kv_cache, sm, toolchain)
                if sizes is None:
                    continue
                largest = fit(part, sizes.load, tokens)
                price = ranked.get(part.name) if ranked is not None else float(memory_gb)
                held = holds(part, sizes.load, batch, tokens)
                rows.append(
                    {
                        "part": part.name, "gpus": count, "gpu": sm, "precision": name,
                        "price": None if price is None else count * price, "holds": held,
                        "weight_bytes": sizes.weight_bytes, "kv_bytes": batch * tokens * sizes.kv_bytes_per_token,
                        "tokens_per_second": decode(part, sizes.load, batch, tokens) if held else None,
                        "largest": asdict(largest),
                    }
                )  # fmt: skip
    rows = [row for row in rows if row["price"] is not None]
    rows.sort(key=lambda row: (not row["holds"], row["price"], -(row["tokens_per_second"] or 0), row["weight_bytes"]))
    if json:
        print_json({"model": prepared.source.label, "batch": batch, "context": tokens, "fits": rows})
    else:
        _show(prepared.source.label, batch, tokens, rows, "price" if ranked is not None else "GB")


def _parts(gpu: str | None) -> list[tuple[Part, str, int]]:
    """Parts with their generation and GB; one part, those of one generation, or all."""
    from compiler.validate.matrix import parts_of
    from specs.hardware import gpu_names, load_gpu

    chosen = [load_gpu(name) for name in gpu_names()] if gpu is None else [load_gpu(gpu)]
    return [
        (part, f"sm{data.sm}", data.parts[part.name].memory)
        for data in chosen
        for part in parts_of(data)
        if gpu is None or gpu in (part.name, f"sm{data.sm}")
    ]


def _ranks(prepared: Prepared, gpus: str) -> dict[int, Graph]:
    """The graph of one of so many GPUs, by their number; without those that can't share the model's heads."""
    from compiler.passes.runner import run_passes
    from compiler.passes.split_tensors import split_tensors

    found = {}
    for text in gpus.split(","):
        if not text.strip().isdecimal() or int(text) < 1:
            raise SpecRTError("CLI-011", f"`--gpus` is `{gpus}`, expected numbers from 1 up, with commas")
        try:
            count = int(text)
            found[count] = prepared.graph if count == 1 else run_passes(prepared.graph, (split_tensors(count, 0),))[0]
        except SpecRTError as error:
            if error.code != "PASS-005":
                raise
    return found


def _sizes(
    prepared: Prepared, rank: Graph, precision: str, kv_cache: str | None, sm: str, toolchain: str
) -> Sizes | None:
    """Sizes on each GPU where the recipe runs on the chip with the toolchain, or None."""
    from compiler.precision import decide
    from compiler.validate.load import cuts_groups, shares_in, sizes_of
    from specs.hardware import load_gpu, load_toolchain
    from specs.precision import load_recipe, with_cache

    recipe = with_cache(load_recipe(precision), kv_cache)
    decision = decide(recipe, load_toolchain(toolchain), load_gpu(sm))
    if not decision.works or decision.base is None:
        return None
    shares = {} if rank is prepared.graph else shares_in(rank)
    if cuts_groups(prepared.built.graph, recipe, shares):
        return None
    return sizes_of(prepared.built.graph, rank, recipe, decision.base, shares)


def _prices(path: Path | None) -> Mapping[str, float] | None:
    from specs.hardware import gpu_names, load_gpu
    from specs.yaml_loader import load_yaml, plain

    if path is None:
        return None
    content = plain(load_yaml(path))
    known = [part for name in gpu_names() for part in load_gpu(name).parts]
    if not isinstance(content, dict) or not all(isinstance(value, (int, float)) for value in content.values()):
        raise SpecRTError("VAL-008", f"`{path}` is no mapping of parts to prices", hint="write `h100-sxm: 2.5`")
    for name in content:
        if name not in known:
            raise SpecRTError(
                "VAL-008", f"`{path}` prices the unknown part `{name}`", hint=f"known: {', '.join(known)}"
            )
    return {name: float(value) for name, value in content.items()}


def _show(label: str, batch: int, context: int, rows: list[dict[str, Any]], unit: str) -> None:
    from rich.table import Table

    console = stdout()
    console.print(
        f"{label}, {batch:,} sequences of {context:,} tokens; weights and cache are of each GPU, "
        "speeds the roofline's, at best, without exchanges",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False)
    for name in (
        "part",
        "GPUs",
        "precision",
        unit,
        "weights",
        "KV cache",
        "decode tokens/s",
        "largest batch × context",
    ):
        table.add_column(name, justify="left" if name in ("part", "precision") else "right")
    best = _best(rows)
    for row in best:
        largest = row["largest"]
        told = f"{largest['batch']:,} × {largest['context']:,}" if largest["batch"] else "does not fit"
        speed = f"{row['tokens_per_second']:,.0f}" if row["holds"] else "–"
        table.add_row(
            row["part"], str(row["gpus"]), row["precision"], f"{row['price']:,g}", bytes_text(row["weight_bytes"]),
            bytes_text(row["kv_bytes"]), speed, told, style="" if row["holds"] else "dim",
        )  # fmt: skip
    console.print(table)
    if not any(row["holds"] for row in rows):
        console.print("no GPU that is asked for holds it; the dim rows say what each would")
    if len(best) < len(rows):
        console.print(f"{len(rows)} combinations; shown is the fastest precision of each part, `--json` has all")


def _best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where there are several parts, the first row of each: it holds the load, and is the fastest that does."""
    if len({row["part"] for row in rows}) == 1:
        return rows
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row["part"], row)
    return list(found.values())
