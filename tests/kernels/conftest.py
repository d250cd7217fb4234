"""The kernels run in Triton's interpreter here (tests/conftest.py chooses it)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter (Triton 3.9) holds bf16 as its bits and multiplies those; widen them first, E4M3 as it does."""
    from triton import language
    from triton.runtime import interpreter

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar == language.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32)
        if handle.dtype.scalar == language.float8e4nv:
            found = interpreter._convert_float(handle.data, handle.dtype.scalar, language.float16, None)
            return found.view(np.float16)
        return handle.data

    def create_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:  # noqa: ARG001
        product = np.matmul(wide(a), wide(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def _rounding_to_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts bits off where it converts to E4M3; the GPU rounds to nearest, ties to even, as PyTorch."""
    from triton import language
    from triton.runtime import interpreter

    inner = interpreter.InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self: Any, source: Any, kind: Any, rounding: Any) -> Any:
        if source.dtype.scalar == language.float32 and kind.scalar == language.float8e4nv:
            codes = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
            return interpreter.TensorHandle(codes.view(torch.uint8).numpy(), kind.scalar)
        return inner(self, source, kind, rounding)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_to_fp", create_fp_to_fp)
