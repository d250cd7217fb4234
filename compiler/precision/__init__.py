"""Whether a recipe, a toolchain and a GPU go together: computed from data, with a reason for each step."""

from compiler.precision.decide import Decision, Reason, decide, require

__all__ = ["Decision", "Reason", "decide", "require"]
