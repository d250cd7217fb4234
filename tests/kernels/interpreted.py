"""Kernels as Triton's interpreter has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compiler.kernels.attention import Launch
from compiler.kernels.build import load

# It has no Gluon: of these the portable kernel, which has the same arguments, constants and numbers
PORTABLE = {"words_hopper.words": "widened.widened", "generated.experts_words": "generated.experts"}


def kernel(launch: Launch) -> Any:
    """The kernel of a launch, in the interpreter."""
    return load(replace(launch, source=PORTABLE.get(launch.source, launch.source)))
