"""The pipelines: which passes, in which order, for which role of a model and which target."""

from __future__ import annotations

from compiler.passes.assign_precision import assign_precision
from compiler.passes.fold_constants import FOLD_CONSTANTS
from compiler.passes.fuse_attention import FUSE_ATTENTION
from compiler.passes.fuse_gated_mlp import FUSE_GATED_MLP
from compiler.passes.fuse_norm import FUSE_NORM
from compiler.passes.fuse_qkv import FUSE_QKV
from compiler.passes.insert_kv_cache import INSERT_KV_CACHE, insert_kv_cache
from compiler.passes.insert_linear_cache import INSERT_LINEAR_CACHE
from compiler.passes.join_codes import JOIN_CODES
from compiler.passes.pack_tokens import PACK_TOKENS
from compiler.passes.peel_last import PEEL_LAST
from compiler.passes.runner import Pass
from compiler.passes.select_rows import SELECT_PADDED_ROWS, SELECT_ROWS

# Fusion first: folding merges equal equations, also halves of two norms on one value, which then match no more.
FUSION = (FUSE_NORM, FUSE_ATTENTION)
SERVING = (INSERT_KV_CACHE, PACK_TOKENS, SELECT_ROWS)
NATIVE = (INSERT_LINEAR_CACHE, SELECT_PADDED_ROWS)  # for TensorRT's own attention and cache layers
# For targets where each product costs a launch. On the CPU they gain nothing (docs/decisions.md).
JOIN_PRODUCTS = (FUSE_GATED_MLP, FUSE_QKV)


def pipeline(
    role: str,
    precision: str,
    target: str,
    quantize: tuple[Pass, ...] = (),
    codes: str | None = None,
    split: tuple[Pass, ...] = (),
    *,
    native: bool = False,
) -> tuple[Pass, ...]:
    """The passes of a role (decoder, encoder) for a target; raises SpecRTError PASS-002 for an unknown precision.

    `quantize` names weights one by one: products are joined behind it, and behind `split`, which takes a rank's part
    of each. `codes` are those of an 8-bit cache.
    """
    on_gpu = target != "cpu"
    serving = NATIVE if native else (insert_kv_cache(codes), *SERVING[1:])
    first = decoder(precision, on_gpu, serving) if role == "decoder" else encoder(precision)
    joined = (*JOIN_PRODUCTS, JOIN_CODES) if quantize else JOIN_PRODUCTS
    return (*first, *quantize, *split, *(joined if on_gpu else ()))


def decoder(precision: str, peel: bool = False, serving: tuple[Pass, ...] = SERVING) -> tuple[Pass, ...]:
    """Tokens in, logits out, with a cache, by default a paged one; `peel`: of the last layer only the rows that are
    wanted go on.
    """
    serving = (*serving[:-1], PEEL_LAST, serving[-1]) if peel else serving
    return (*FUSION, *serving, FOLD_CONSTANTS, assign_precision(precision))


def encoder(precision: str) -> tuple[Pass, ...]:
    """All tokens at once, rows padded."""
    return (*FUSION, FOLD_CONSTANTS, assign_precision(precision))
