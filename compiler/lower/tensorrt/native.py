"""A decoder as one engine with TensorRT's own attention and cache layers: what is refused, and its profiles.

A call has one token of every sequence, or the tokens of one: so nothing is padded, and each is a profile of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from compiler.ir.types import Sym
from compiler.lower.low_bit import LowBitProduct
from compiler.lower.tensorrt.network import ENDS
from specs.errors import SpecRTError, Where


def check_native(kv_cache: str | None, where: Where | None) -> None:
    """Raise SpecRTError LOWER-038 for a cache in a type that TensorRT's has not."""
    if kv_cache is not None:
        message = f"`attention: native` keeps keys and values in the precision's own type, not in {kv_cache}"
        hint = "leave `attention` out, or the type of the cache"
        raise SpecRTError("LOWER-038", message, where=where, hint=hint)


def check_products(products: Sequence[LowBitProduct], toolchain: str) -> None:
    """Raise SpecRTError LOWER-038 where products are left to kernels of ours: those would be steps between engines."""
    if products:
        first = products[0].product
        message = f"`attention: native` is one engine, and {toolchain} leaves %{first.result.name} to a kernel"
        hint = "leave `attention` out, or choose a precision that is native there: `specrt validate` shows which"
        raise SpecRTError("LOWER-038", message, where=first.where, hint=hint)


def native_profiles(dims: Sequence[Sym], ends: Sequence[int] = ENDS[1:]) -> tuple[tuple[Sym, ...], ...]:
    """One token of every sequence; the tokens of one, up to each of `ends`, and the rest."""
    sizes = {sym.name: sym for sym in dims}
    batch, length, rows = (sizes[name] for name in ("B", "S", "N"))
    decode = {
        "B": replace(batch, opt=batch.hi),
        "S": replace(length, opt=1, hi=1),
        "N": Sym("N", 1, batch.hi, batch.hi),
    }
    chosen = [decode]
    low = 1
    for end in (*(end for end in ends if end < length.hi), length.hi):
        best = max(low, end // 2 if end < length.hi else length.opt)
        prompt = {"B": Sym("B", 1, 1, 1), "S": Sym("S", low, best, end), "N": Sym("N", 1, 1, min(end, rows.hi))}
        chosen.append(prompt)
        low = end + 1
    return tuple(tuple(profile.get(sym.name, sym) for sym in dims) for profile in chosen)
