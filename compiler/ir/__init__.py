"""The graph IR: a typed, immutable list of equations that prints, parses, verifies and runs.

`parse(str(graph)) == graph`; `verify(graph)` re-infers every type; `run(graph, ...)` is its meaning, in PyTorch.
"""

from compiler.ir.builder import Builder
from compiler.ir.core import Arg, Block, Equation, Graph, Value, walk
from compiler.ir.types import DTYPES, Dim, Sym, TensorType

__all__ = ["DTYPES", "Arg", "Block", "Builder", "Dim", "Equation", "Graph", "Sym", "TensorType", "Value", "walk"]
