"""One small graph for each way in which a rule fires or is refused. Names become names of golden files."""

from __future__ import annotations

from compiler.passes.assign_precision import assign_precision
from compiler.passes.fold_constants import FOLD_CONSTANTS
from compiler.passes.fuse_attention import FUSE_ATTENTION
from compiler.passes.fuse_gated_mlp import FUSE_GATED_MLP
from compiler.passes.fuse_norm import FUSE_NORM
from compiler.passes.fuse_qkv import FUSE_QKV
from compiler.passes.insert_kv_cache import INSERT_KV_CACHE
from compiler.passes.insert_linear_cache import INSERT_LINEAR_CACHE
from compiler.passes.pack_tokens import PACK_TOKENS
from compiler.passes.runner import Pass
from compiler.passes.select_rows import SELECT_PADDED_ROWS, SELECT_ROWS
from tests.passes import cases_fusion as fusion
from tests.passes import cases_serving as serving
from tests.passes.cases_fusion import Case

CASES: dict[str, tuple[Pass, Case]] = {
    f"{item.name}/{name}": (item, case)
    for item, cases in (
        (FUSE_NORM, fusion.FUSE_NORM_CASES),
        (FUSE_ATTENTION, fusion.FUSE_ATTENTION_CASES),
        (FUSE_GATED_MLP, fusion.FUSE_GATED_MLP_CASES),
        (FUSE_QKV, fusion.FUSE_QKV_CASES),
        (INSERT_KV_CACHE, serving.INSERT_KV_CACHE_CASES),
        (INSERT_LINEAR_CACHE, serving.INSERT_LINEAR_CACHE_CASES),
        (PACK_TOKENS, serving.PACK_TOKENS_CASES),
        (SELECT_ROWS, serving.SELECT_ROWS_CASES),
        (SELECT_PADDED_ROWS, serving.SELECT_PADDED_ROWS_CASES),
        (FOLD_CONSTANTS, serving.FOLD_CONSTANTS_CASES),
    )
    for name, case in cases.items()
}
CASES |= {
    f"assign_precision/{name}": (assign_precision(precision), case)
    for name, (precision, case) in serving.ASSIGN_PRECISION_CASES.items()
}
