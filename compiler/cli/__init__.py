"""The command line: `specrt`, and `compile`, which is `specrt compile` by itself.

Commands only render: what they show comes from `compiler.api`, `compiler.explain`, `compiler.sizes`, `compiler.stages`,
`compiler.draw`, `compiler.doctor`, `compiler.infer`, `compiler.benchmark` and `runtime`. docs/cli.md documents exit
codes and the keys of `--json`.
"""

from __future__ import annotations


def main() -> None:
    """`specrt`."""
    from compiler.cli.app import app

    app(prog_name="specrt")


def compile_main() -> None:
    """`compile`, the same as `specrt compile`."""
    from compiler.cli.app import compile_app

    compile_app(prog_name="compile")
