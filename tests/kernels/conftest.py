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
def _rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts bits off where it converts to E4M3 or bf16; the GPU rounds to nearest, ties to even."""
    from triton import language
    from triton.runtime import interpreter

    kinds = {
        language.float8e4nv: (torch.float8_e4m3fn, torch.uint8), language.bfloat16: (torch.bfloat16, torch.uint16),
    }  # fmt: skip

    def nearest(inner: Any) -> Any:
        def convert(self: Any, source: Any, kind: Any, *rounding: Any) -> Any:
            if source.dtype.scalar != language.float32 or kind.scalar not in kinds:
                return inner(self, source, kind, *rounding)
            held, bits = kinds[kind.scalar]
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(held)
            return interpreter.TensorHandle(rounded.view(bits).numpy(), kind.scalar)

        return convert

    builder = interpreter.InterpreterBuilder
    for name in ("create_fp_to_fp", "create_fp_trunc"):
        monkeypatch.setattr(builder, name, nearest(getattr(builder, name)))
