"""The two typer applications; commands import what they need when they run, so that `--help` is instant."""

from __future__ import annotations

from typing import Annotated

import typer

import specs
from compiler.cli.bench import bench_command
from compiler.cli.build import build_command
from compiler.cli.compile import compile_command
from compiler.cli.diff import diff_command
from compiler.cli.doctor import doctor_command
from compiler.cli.explain import explain_command
from compiler.cli.fit import fit_command
from compiler.cli.infer import infer_command
from compiler.cli.inspect import inspect_command
from compiler.cli.models import models_command
from compiler.cli.run import run_command
from compiler.cli.serve import serve_command
from compiler.cli.validate import validate_command

_HELP = "A language model is a YAML file: compile it to a bundle, look inside, run it."
_EPILOG = "Exit codes: 0 done, 1 a mistake in what was given, 2 wrong usage, 70 a bug in SpecRT, 130 interrupted."

app = typer.Typer(
    help=_HELP,
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
compile_app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"specrt {specs.__version__}")
        raise typer.Exit


@app.callback()
def _specrt(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A language model is a YAML file: compile it to a bundle, look inside, run it."""


app.command("compile", epilog=_EPILOG)(compile_command)
app.command("build", epilog=_EPILOG)(build_command)
app.command("run", epilog=_EPILOG)(run_command)
app.command("serve", epilog=_EPILOG)(serve_command)
app.command("bench", epilog=_EPILOG)(bench_command)
app.command("inspect", epilog=_EPILOG)(inspect_command)
app.command("explain", epilog=_EPILOG)(explain_command)
app.command("infer", epilog=_EPILOG)(infer_command)
app.command("diff", epilog=_EPILOG)(diff_command)
app.command("models", epilog=_EPILOG)(models_command)
app.command("validate", epilog=_EPILOG)(validate_command)
app.command("fit", epilog=_EPILOG)(fit_command)
app.command("doctor", epilog=_EPILOG)(doctor_command)
compile_app.command(epilog=_EPILOG)(compile_command)
