"""SpecRT's compiler: `compiler.compile(source, ...)` turns a model written as data into a bundle for `runtime`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compiler.api import Prepared, compile, prepare

__all__ = ["Prepared", "compile", "prepare"]


def __getattr__(name: str) -> Any:
    """Load the API on first use, so that `import compiler` costs nothing."""
    if name in __all__:
        from compiler import api

        return getattr(api, name)
    raise AttributeError(f"module `compiler` has no attribute `{name}`")
