"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        show_default=False,
        help="An architecture file (specs/models/*.yaml), a checkpoint folder or archive, or a deployment file.",
    ),
]
SourceOrBundle = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE|BUNDLE",
        show_default=False,
        help="An architecture file, a checkpoint folder or archive, a deployment file, or a compiled bundle.",
    ),
]
CheckpointArgument = Annotated[
    Path | None,
    typer.Argument(metavar="CHECKPOINT", show_default=False, help="The checkpoint folder, where SOURCE is a file."),
]
Size = Annotated[str | None, typer.Option(show_default=False, help="One of the architecture's `sizes`.")]
Target = Annotated[str | None, typer.Option(help="cpu, or a GPU's architecture as sm90.", show_default="cpu")]
Toolchain = Annotated[
    str | None,
    typer.Option(help="TensorRT for a GPU, as tensorrt-10.8.", show_default="the installed, else tensorrt-8.6"),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="A recipe of specs/precisions, a recipe file, or checkpoint: low-bit weights as they are stored.",
        show_default="checkpoint if that is low-bit, else fp32",
    ),
]
KvCache = Annotated[
    str | None,
    typer.Option("--kv-cache", help="Keys and values in int8 or fp8, with any precision.", show_default="the recipe's"),
]
MaxBatch = Annotated[int | None, typer.Option(min=1, help="Sequences served at once.", show_default="8")]
MaxSequence = Annotated[
    int | None,
    typer.Option(min=1, help="Longest sequence, prompt and answer together.", show_default="the model's context"),
]
TensorParallel = Annotated[int | None, typer.Option(min=1, help="GPUs that share each product.", show_default="1")]
PipelineParallel = Annotated[
    int | None, typer.Option(min=1, help="Stages of layers, each on GPUs of its own.", show_default="1")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else (docs/cli.md).")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (also SPECRT_DEBUG=1).")]
