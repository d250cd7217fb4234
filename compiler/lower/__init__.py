"""From a finished graph to what a runtime executes: capability decides where to cut, a backend writes each segment."""

from compiler.lower.capability import Decompose, Emit, Unsupported, Verdict
from compiler.lower.lowering import Lowered, lower
from compiler.lower.partition import Segment, partition
from compiler.lower.plan import Plan, Step

__all__ = ["Decompose", "Emit", "Lowered", "Plan", "Segment", "Step", "Unsupported", "Verdict", "lower", "partition"]
