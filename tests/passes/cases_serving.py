"""Cases of the passes around the cache, of constants and of precision."""

from __future__ import annotations

from compiler.ir import Graph
from compiler.ir.parser import parse
from compiler.passes.fuse_attention import FUSE_ATTENTION
from compiler.passes.fuse_norm import FUSE_NORM
from compiler.passes.fuse_qkv import FUSE_QKV
from compiler.passes.insert_kv_cache import INSERT_KV_CACHE
from compiler.passes.insert_linear_cache import INSERT_LINEAR_CACHE
from compiler.passes.pack_tokens import PACK_TOKENS
from compiler.passes.select_rows import SELECT_ROWS
from tests.passes.cases_fusion import PLAIN, Case
from tests.passes.graphs import EXPERTS, LOWEST, ROPE, after, edited, graph, model, text_of, unrolled

# -- cache, packing, selection ---------------------------------------------------------------------------------------


def fused(**options: object) -> Graph:
    """A two-layer model with norms and attention fused."""
    return after(model(**options).graph, FUSE_NORM, FUSE_ATTENTION)  # type: ignore[arg-type]


def mixed() -> Graph:
    """Two layers written out, of which the second sees later tokens."""
    source = unrolled(fused())
    first, found, rest = text_of(source).partition("%attn.attention.r1")
    return parse(first + found + rest.replace("causal = true", "causal = false", 1))


def cached(**options: object) -> Graph:
    """The same with its cache inserted."""
    return after(fused(**options), INSERT_KV_CACHE)


def packed(**options: object) -> Graph:
    """The same packed."""
    return after(cached(**options), PACK_TOKENS)


INSERT_KV_CACHE_CASES: dict[str, Case] = {
    "decoder": fused,
    "prefix_alibi": lambda: fused(attention="mask: prefix, position: {kind: alibi, scaled: false}"),
    "unrolled": lambda: unrolled(fused()),
    "joined_weights": lambda: after(fused(), FUSE_QKV),
    "refused_encoder": lambda: fused(attention=f"mask: full, {PLAIN}"),
    "refused_mixed": mixed,
    "refused_not_fused": lambda: after(model().graph, FUSE_NORM),
    "refused_half_fused": lambda: after(_half_fused(), FUSE_ATTENTION),
    "refused_name_taken": lambda: edited(
        fused(), ("%positions: i32[B,S])", "%positions: i32[B,S], %past_lens: i32[B])")
    ),
}

INSERT_LINEAR_CACHE_CASES: dict[str, Case] = {
    "decoder": fused,
    "prefix_alibi": lambda: fused(attention="mask: prefix, position: {kind: alibi, scaled: false}"),
    "refused_encoder": lambda: fused(attention=f"mask: full, {PLAIN}"),
    "refused_name_taken": INSERT_KV_CACHE_CASES["refused_name_taken"],
}

PACK_TOKENS_CASES: dict[str, Case] = {
    "decoder": cached,
    "prefix": lambda: cached(attention=f"mask: prefix, position: {ROPE}"),
    "layer_norm": lambda: after(
        model(norm="{kind: layer_norm, eps: 1.0e-5, bias: true}", mlp="{kind: mlp, act: gelu}").graph,
        FUSE_ATTENTION,
        INSERT_KV_CACHE,
    ),
    "experts": lambda: cached(mlp=EXPERTS),
    "refused_attention": fused,
    "refused_mean_over_tokens": lambda: _pooled("mean"),
    "refused_softmax_over_tokens": lambda: _pooled("softmax"),
    "refused_tokens_taken_apart": lambda: _tokens(
        '%flat: f32[B,1,S,16] = reshape(%e) {shape = ("B", 1, "S", 16)}', "flat"
    ),
    "refused_transpose": lambda: _tokens("%turned: f32[B,16,S] = transpose(%e) {axes = (-1, -2)}", "turned"),
    "router": lambda: _tokens(
        '%r: f32[4,16] = weight() {name = "router"} %s: f32[B,S,4] = matmul(%e, %r) {transpose_b = true}'
        "%y: f32[B,S,4] = softmax(%s)",
        "y",
    ),
    "refused_scores": lambda: _tokens("%scores: f32[B,S,S] = matmul(%e, %e) {transpose_b = true}", "scores"),
    "refused_table_by_column": lambda: _tokens(
        '%table: f32[1,1,16] = weight() {name = "table"} %sum: f32[B,S,16] = add(%e, %table)', "sum"
    ),
    "refused_no_tokens": lambda: graph("%y: f32[B,S,16] = exp(%x)"),
}

SELECT_ROWS_CASES: dict[str, Case] = {
    "final_norm_and_head": packed,
    "unrolled": lambda: after(unrolled(fused()), INSERT_KV_CACHE, PACK_TOKENS),
    "hidden_states_too": lambda: packed(output="last_hidden_state = norm_f(x)\n  - logits = head(last_hidden_state)"),
    "refused_not_packed": cached,
    "refused_no_logits": lambda: edited(packed(), ("return logits =", "return hidden =")),
    "refused_twice": lambda: after(packed(), SELECT_ROWS),
}

SELECT_PADDED_ROWS_CASES: dict[str, Case] = {
    "padded": lambda: after(fused(), INSERT_LINEAR_CACHE),
    "refused_packed": packed,
}


def _tokens(body: str, result: str) -> Graph:
    """An embedding of tokens, and one equation that packing meets."""
    table = '%w: f32[32,16] = weight() {name = "embed.weight"} %e: f32[B,S,16] = gather(%w, %tokens)'
    return graph(f"{table} {body}", inputs="%tokens: i32[B,S], %positions: i32[B,S]", result=result)


def _pooled(op: str) -> Graph:
    kind = "f32[B,1]" if op == "mean" else "f32[B,S]"
    return _tokens(f'%at: f32[B,S] = cast(%positions) {{dtype = "f32"}} %y: {kind} = {op}(%at)', "y")


def _half_fused() -> Graph:
    text = text_of(unrolled(after(model().graph, FUSE_NORM)))
    first, found, rest = text.partition("%attn.masked.r1")
    return parse(first + found + rest.replace(LOWEST, "-10000.0", 1))


# -- constants, precision --------------------------------------------------------------------------------------------

FOLD_CONSTANTS_CASES: dict[str, Case] = {
    "constant": lambda: graph(
        "%a: f32[2] = const() {value = (1.0, 2.0)} %b: f32[2] = mul(%a, 0.1) %c: f32[2] = exp(%b)"
        '%w: f32[2] = weight() {name = "w"} %y: f32[B,S,2] = mul(%x, %c) %z: f32[B,S,2] = mul(%y, %w)',
        inputs="%x: f32[B,S,2]",
        result="z",
    ),
    "scalar": lambda: graph("%one: f32[] = const() {value = 0.5} %y: f32[B,S,16] = mul(%one, %x)"),
    "identity": lambda: graph(
        "%a: f32[B,S,16] = mul(%x, 1.0) %b: f32[B,S,16] = add(0.0, %a) %c: f32[B,S,16] = div(%b, 1.0)"
        '%d: f32[B,S,16] = reshape(%c) {shape = ("B", "S", 16)} %e: f32[B,S,16] = cast(%d) {dtype = "f32"}'
        "%f: f32[B,S,16] = slice(%e) {axis = -1, start = 0, stop = 16} %g: f32[B,S,16] = concat(%f) {axis = -1}"
        "%h: f32[B,S,16] = transpose(%g) {axes = (-2, -1)} %y: f32[B,S,16] = relu(%h)"
    ),
    "chain": lambda: graph(
        '%a: f32[B,S,4,4] = reshape(%x) {shape = ("B", "S", 4, 4)}'
        '%b: f32[B,S,2,8] = reshape(%a) {shape = ("B", "S", 2, 8)}'
        '%c: f32[B,S,16] = reshape(%b) {shape = ("B", "S", 16)} %d: f32[B,S,16] = relu(%c)'
        '%y: f32[B,S,2,8] = reshape(%d) {shape = ("B", "S", 2, 8)} %z: f32[B,S,2,8] = mul(%b, %y)',
        result="z",
    ),
    "equal": lambda: graph(
        '%a: f32[16] = weight() {name = "w"} %b: f32[16] = weight() {name = "w"} %c: f32[B,S,16] = mul(%x, %a)'
        '%d: f32[B,S,16] = mul(%x, %b) %e: bf16[B,S,16] = cast(%c) {dtype = "bf16"}'
        '%f: bf16[B,S,16] = cast(%d) {dtype = "bf16"} %y: bf16[B,S,16] = add(%e, %f)'
    ),
    "equal_around_repeat": lambda: graph(
        "%a: f32[B,S,16] = exp(%x) %y: f32[B,S,16] = repeat(%a) {count = 2} (%p: f32[B,S,16]) => {"
        "%b: f32[B,S,16] = exp(%x) %c: f32[B,S,16] = add(%p, %b) yield %c }"
    ),
    "dead": lambda: graph("%a: f32[B,S,16] = exp(%x) %b: f32[B,S,16] = relu(%a) %y: f32[B,S,16] = tanh(%x)"),
    "kept": lambda: graph(
        # not the same: another type of literal, another attribute, weights, a constant with a symbolic dim
        "%a: f32[B,S,16] = gelu(%x) {approximate = true} %b: f32[B,S,16] = gelu(%x) {approximate = false}"
        '%c: f32[B,S,16] = sub(%a, %b) %w: f32[16] = weight() {name = "w"} %d: f32[16] = mul(%w, 2.0)'
        "%e: f32[B,S,16] = mul(%c, %d) %f: f32[B,S,16] = sub(0.0, %e) %y: f32[B,S,16] = sub(1.0, %f)"
    ),
}

ASSIGN_PRECISION_CASES: dict[str, tuple[str, Case]] = {
    "bf16_decoder": ("bf16", lambda: after(packed(), SELECT_ROWS)),
    "fp16_encoder": ("fp16", lambda: fused(attention=f"mask: full, position: {ROPE}")),
    "fp32": ("fp32", lambda: fused()),
    "bf16_not_fused": ("bf16", lambda: model(layers=1).graph),
    "bf16_constants": (
        "bf16",
        lambda: graph(
            '%w: f32[16] = weight() {name = "w"} %a: f32[B,S,16] = mul(%x, %w)'
            "%c: f32[2] = const() {value = (0.5, 2.0)} %d: f32[B,S,2] = slice(%a) {axis = -1, start = 0, stop = 2}"
            "%y: f32[B,S,2] = mul(%d, %c)"
        ),
    ),
}
