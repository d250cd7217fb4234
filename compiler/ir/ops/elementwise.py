"""Elementwise operations; scalar literals take the type of the tensor beside them.

Meanings import PyTorch when they run, so that printing, checking and rewriting a graph never load it.
"""

from __future__ import annotations

from typing import Any

from compiler.ir.ops.registry import TypeRuleError, broadcast, op
from compiler.ir.types import DTYPES, STORED, TensorType

Operand = TensorType | float | int | bool | None


def _shapes(*operands: Operand) -> tuple[Any, ...]:
    return broadcast(*(operand.shape if isinstance(operand, TensorType) else () for operand in operands))


def _same_dtype(*operands: Operand) -> str:
    dtypes = {operand.dtype for operand in operands if isinstance(operand, TensorType)}
    if len(dtypes) != 1:
        raise TypeRuleError(f"operands have different types: {', '.join(sorted(dtypes))}")
    return dtypes.pop()


def _binary(a: Operand, b: Operand) -> tuple[TensorType, ...]:
    dtype = _same_dtype(a, b)
    if dtype == "bool" or dtype in STORED:
        raise TypeRuleError(f"arithmetic on {dtype}")
    return (TensorType(dtype, _shapes(a, b)),)


def _compare(a: Operand, b: Operand, *, kind: str) -> tuple[TensorType, ...]:
    if kind not in ("lt", "le", "gt", "ge", "eq", "ne"):
        raise TypeRuleError(f"unknown comparison `{kind}`")
    _same_dtype(a, b)
    return (TensorType("bool", _shapes(a, b)),)


def _logical(a: Operand, b: Operand) -> tuple[TensorType, ...]:
    if _same_dtype(a, b) != "bool":
        raise TypeRuleError("`and` and `or` take bool")
    return (TensorType("bool", _shapes(a, b)),)


def _where(condition: Operand, a: Operand, b: Operand) -> tuple[TensorType, ...]:
    if not isinstance(condition, TensorType) or condition.dtype != "bool":
        raise TypeRuleError("the condition of `where` must be bool")
    return (TensorType(_same_dtype(a, b), _shapes(condition, a, b)),)


@op("a: T[*N], b: T[*N] -> T[*N]", infer=_binary, literals=True, commutative=True)
def add(a: Any, b: Any) -> Any:
    """a + b, broadcast."""
    return a + b


@op("a: T[*N], b: T[*N] -> T[*N]", infer=_binary, literals=True)
def sub(a: Any, b: Any) -> Any:
    """a - b, broadcast."""
    return a - b


@op("a: T[*N], b: T[*N] -> T[*N]", infer=_binary, literals=True, commutative=True)
def mul(a: Any, b: Any) -> Any:
    """a * b, broadcast."""
    return a * b


@op("a: T[*N], b: T[*N] -> T[*N]", infer=_binary, literals=True)
def div(a: Any, b: Any) -> Any:
    """a / b, broadcast."""
    return a / b


@op("a: T[*N], b: T[*N] -> T[*N]", infer=_binary, literals=True)
def maximum(a: Any, b: Any) -> Any:
    """max(a, b), broadcast."""
    import torch

    return torch.maximum(*_tensors(a, b))


@op("a: T[*N], b: T[*N] -> T[*N]", infer=_binary, literals=True)
def minimum(a: Any, b: Any) -> Any:
    """min(a, b), broadcast."""
    import torch

    return torch.minimum(*_tensors(a, b))


def _tensors(a: Any, b: Any) -> tuple[Any, Any]:
    import torch

    like = a if isinstance(a, torch.Tensor) else b
    return torch.as_tensor(a, dtype=like.dtype), torch.as_tensor(b, dtype=like.dtype)


@op("a: T[*N], b: T[*N] -> bool[*N]", infer=_compare, literals=True)
def compare(a: Any, b: Any, *, kind: str) -> Any:
    """a <kind> b, broadcast; kind is lt, le, gt, ge, eq or ne."""
    import operator

    return getattr(operator, kind)(a, b)


@op("a: bool[*N], b: bool[*N] -> bool[*N]", infer=_logical, commutative=True)
def and_(a: Any, b: Any) -> Any:
    """a and b, broadcast."""
    return a & b


@op("a: bool[*N], b: bool[*N] -> bool[*N]", infer=_logical, commutative=True)
def or_(a: Any, b: Any) -> Any:
    """a or b, broadcast."""
    return a | b


@op("condition: bool[*N], a: T[*N], b: T[*N] -> T[*N]", infer=_where, literals=True)
def where(condition: Any, a: Any, b: Any) -> Any:
    """a where the condition holds, else b, broadcast."""
    import torch

    return torch.where(condition, *_tensors(a, b))


@op("x: F[*N] -> F[*N]")
def exp(x: Any) -> Any:
    """e to the x."""
    return x.exp()


@op("x: F[*N] -> F[*N]")
def rsqrt(x: Any) -> Any:
    """1 / sqrt(x)."""
    return x.rsqrt()


@op("x: F[*N] -> F[*N]")
def cos(x: Any) -> Any:
    """cos(x), x in radians."""
    return x.cos()


@op("x: F[*N] -> F[*N]")
def sin(x: Any) -> Any:
    """sin(x), x in radians."""
    return x.sin()


@op("x: F[*N] -> F[*N]")
def tanh(x: Any) -> Any:
    """Hyperbolic tangent."""
    return x.tanh()


@op("x: F[*N] -> F[*N]")
def erf(x: Any) -> Any:
    """Gauss error function."""
    return x.erf()


@op("x: F[*N] -> F[*N]")
def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return x.sigmoid()


@op("x: F[*N] -> F[*N]")
def relu(x: Any) -> Any:
    """max(x, 0)."""
    return x.relu()


@op("x: F[*N] -> F[*N]")
def silu(x: Any) -> Any:
    """x * sigmoid(x) (arXiv:1702.03118)."""
    import torch

    return torch.nn.functional.silu(x)


@op("x: F[*N] -> F[*N]")
def gelu(x: Any, *, approximate: bool) -> Any:
    """GELU (arXiv:1606.08415): x/2 (1 + erf(x/sqrt 2)), or with `approximate` its tanh form."""
    import torch

    return torch.nn.functional.gelu(x, approximate="tanh" if approximate else "none")


def _cast(x: TensorType, *, dtype: str) -> tuple[TensorType, ...]:
    if dtype not in DTYPES:
        raise TypeRuleError(f"unknown element type `{dtype}`")
    if dtype in STORED and dtype != x.dtype:
        raise TypeRuleError(f"`cast` does not make {dtype}: `quantize` does")
    return (x.with_dtype(dtype),)


@op("x: T[*N] -> T[*N]", infer=_cast)
def cast(x: Any, *, dtype: str) -> Any:
    """x in another element type; float to narrower float rounds to nearest even."""
    from compiler.ir.interpreter import torch_dtype

    return x.to(torch_dtype(dtype))
