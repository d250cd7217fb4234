"""Every operation of the IR. `REGISTRY[name]` has the type rule, the documentation and the meaning."""

from compiler.ir.ops import (
    attention,
    cache,
    elementwise,
    exchange,
    linear,
    movement,
    norm,
    quantize,
    routing,
    structure,
)
from compiler.ir.ops.registry import REGISTRY, Attribute, Op, Operand, TypeRuleError

__all__ = [
    "REGISTRY",
    "Attribute",
    "Op",
    "Operand",
    "TypeRuleError",
    "attention",
    "cache",
    "elementwise",
    "exchange",
    "linear",
    "movement",
    "norm",
    "quantize",
    "routing",
    "structure",
]
