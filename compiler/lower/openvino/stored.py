"""Weights on their way into an engine: PyTorch tensors while only weights meet, then constants that share memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compiler.ir.core import Equation, Value
from compiler.ir.formats import HALF_BYTES, pack
from compiler.ir.interpreter import torch_dtype
from compiler.ir.ops import REGISTRY
from compiler.ir.types import TensorType

if TYPE_CHECKING:
    import torch

# They place elements and compute none, so they may work on the checkpoint's own type.
_MOVEMENT = frozenset({"concat", "slice", "reshape", "transpose"})
_NARROW_FLOATS = ("bf16", "f16")


@dataclass(frozen=True)
class Stored:
    """A value known at compile time; `tensor` may be of a narrower float type than `type`, which widens exactly."""

    tensor: torch.Tensor
    type: TensorType
    name: str


def stored_weight(tensor: torch.Tensor, kind: TensorType, name: str) -> Stored:
    """A weight as it will be written: in its own type if that is a 16-bit float where float32 is asked for."""
    import torch

    narrow = kind.dtype == "f32" and tensor.dtype in (torch.bfloat16, torch.float16)
    return Stored(tensor if narrow else tensor.to(torch_dtype(kind.dtype)), kind, name)


def evaluate(equation: Equation, operands: list[Any]) -> Stored:
    """An equation of stored operands (or literals), computed as the interpreter would."""
    result: Value = equation.result
    first = operands[0]
    if equation.op == "cast" and first.type.dtype in _NARROW_FLOATS and result.type.dtype == "f32":
        return Stored(first.tensor, result.type, first.name)
    tensors = [operand.tensor for operand in operands if isinstance(operand, Stored)]
    together = equation.op in _MOVEMENT and len({tensor.dtype for tensor in tensors}) == 1
    args = [
        (operand.tensor if together else operand.tensor.to(torch_dtype(operand.type.dtype)))
        if isinstance(operand, Stored)
        else operand
        for operand in operands
    ]
    attrs = dict(equation.attr)
    if equation.op == "reshape":
        attrs["shape"] = result.type.static_shape()
    return Stored(REGISTRY[equation.op].body(*args, **attrs), result.type, result.name)


def ir_value(value: Any, kind: TensorType) -> Any:
    """A `const` as a PyTorch tensor."""
    import torch

    return torch.tensor(value, dtype=torch_dtype(kind.dtype))


def constant(tensor: torch.Tensor, dtype: str) -> Any:
    """An OpenVINO constant over a contiguous tensor's own memory; keep it alive until the model is written.

    Half bytes are packed over the whole tensor, into memory of the constant's own.
    """
    import openvino as ov
    import torch
    from openvino.op import Constant

    if dtype in HALF_BYTES:
        packed = pack(tensor.reshape(-1), dtype).numpy()
        return Constant(ov.Tensor(packed, ov.Shape(list(tensor.shape)), getattr(ov.Type, dtype)), shared_memory=False)
    if dtype in ("f8e4m3", "f8e8m0"):
        bits = tensor.view(torch.uint8).numpy()
        return Constant(ov.Tensor(bits, ov.Shape(list(tensor.shape)), getattr(ov.Type, dtype)), shared_memory=True)
    if tensor.dtype is torch.bfloat16:
        bits = tensor.view(torch.int16).numpy()
        return Constant(ov.Tensor(bits, ov.Shape(list(tensor.shape)), ov.Type.bf16), shared_memory=True)
    return Constant(ov.Tensor(tensor.numpy(), shared_memory=True), shared_memory=True)
