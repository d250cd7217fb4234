"""`specrt bench`: how fast a bundle runs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from compiler.cli.console import bytes_text, command, print_json, stdout
from compiler.cli.options import Debug, Json


@command
def bench_command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", show_default=False, help="A compiled bundle.")],
    workload: Annotated[
        list[str] | None,
        typer.Option(
            "--workload", "-w", metavar="INxOUTxCONCURRENCY",
            help="Requests at once, of so many tokens, that make so many new ones each; may be repeated.",
            show_default="128 and 2048 in and out, for one request and for the bundle's max_batch",
        ),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="How often each is timed; medians are shown.")] = 3,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 (read by @command)
) -> None:  # fmt: skip
    """Time a bundle: first token, tokens a second, decode steps, and how much of the memory's bandwidth they use.

    Prompts are random tokens. A bundle that was compiled with `--weights random` is as fast as one with real weights.
    """
    from compiler.benchmark import benchmark, read_workload
    from compiler.cli.progress import Stages

    asked = None if workload is None else [read_workload(text) for text in workload]
    with Stages("load the bundle", quiet=json) as stages:
        record = benchmark(bundle, asked, runs=runs, told=lambda so_far: stages.say(_last(so_far)))
    if json:
        print_json(record)
    else:
        _show(record)


def _last(record: dict[str, Any]) -> str:
    """What was measured last."""
    done = record["workloads"]
    return f"measured {_name(done[-1])}" if done else f"first token of {record['first_token'][-1]['input_len']}"


def _name(entry: dict[str, Any]) -> str:
    return "{input_len}x{output_len}x{concurrency}".format(**entry)


def _show(record: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console, machine = stdout(), record["machine"]
    engine = f"TensorRT {machine['tensorrt']}" if "gpu" in machine else f"OpenVINO {machine['openvino']}"
    device = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    if machine.get("gpus", 1) > 1:
        device = f"{machine['gpus']} x {device}"
    console.print(f"{escape(record['model'])}, {record['precision']}, {engine}, {escape(device)}", soft_wrap=True)
    used = "in use on the GPU" if "gpu" in machine else "of memory at most"
    console.print(
        f"loaded in {record['load_seconds']:.1f} s, {bytes_text(record['memory_bytes'])} {used}, "
        f"KV cache of {record['cache_tokens']:,} tokens", soft_wrap=True,
    )  # fmt: skip
    for entry in record["first_token"]:
        console.print(f"first token of {entry['input_len']:,}: {entry['ttft_ms']['median']:.2f} ms", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for name in ("workload", "output tokens/s", "range", "first token", "decode step", "bandwidth"):
        table.add_column(name, justify="left" if name == "workload" else "right", no_wrap=True)
    for entry in record["workloads"]:
        rate, step = entry["output_tokens_per_second"], entry.get("decode_step_ms")
        share = entry.get("decode_roofline_share")
        table.add_row(
            _name(entry), f"{rate['median']:,.0f}", f"{rate['least']:,.0f}-{rate['greatest']:,.0f}",
            f"{entry['ttft_ms']['median']:.1f} ms", f"{step['median']:.2f} ms" if step else "–",
            f"{entry['decode_gb_s']:,.0f} GB/s" + (f", {share:.0%}" if share else "") if step else "–",
        )  # fmt: skip
    console.print(table)
    for entry in record["left_out"]:
        console.print(f"[dim]left out: {entry['workload']}, {entry['reason']}[/]", soft_wrap=True)
