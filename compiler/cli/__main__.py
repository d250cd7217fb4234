"""`python -m compiler.cli` is `specrt`."""

from __future__ import annotations

from compiler.cli import main

main()
