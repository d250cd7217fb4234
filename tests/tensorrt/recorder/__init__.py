"""A stand-in for the module `tensorrt` of any recorded version: it takes what that version's API lists, keeps the
network, holds it to strong typing and computes it with PyTorch.

    trt = recorder.module("10.3.0")
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.tensorrt.recorder.api import VERSIONS, api
from tests.tensorrt.recorder.network import Builder, Logger, Network, Weights, make_weights

__all__ = ["VERSIONS", "Builder", "Network", "Weights", "module"]


def module(version: str) -> Any:
    """What `import tensorrt` would give."""
    known = api(version)
    return SimpleNamespace(
        __version__=known.version,
        Builder=lambda logger: Builder(known, logger),
        Logger=Logger,
        ILogger=Logger,
        Weights=lambda *args: make_weights(known, *args),
        **known.enums,
    )
