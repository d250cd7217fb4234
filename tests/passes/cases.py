"""One small graph for each way in which a rule fires or is refused. Names become names of golden files.

Refused cases are mostly graphs that fire, with one line of their text changed.
"""

from __future__ import annotations

from collections.abc import Callable

from compiler.ir import Graph
from compiler.ir.parser import parse
from compiler.passes.assign_precision import assign_precision
from compiler.passes.fold_constants import FOLD_CONSTANTS
from compiler.passes.fuse_attention import FUSE_ATTENTION
from compiler.passes.fuse_gated_mlp import FUSE_GATED_MLP
from compiler.passes.fuse_norm import FUSE_NORM
from compiler.passes.fuse_qkv import FUSE_QKV
from compiler.passes.insert_kv_cache import INSERT_KV_CACHE
from compiler.passes.pack_tokens import PACK_TOKENS
from compiler.passes.runner import Log, Pass
from compiler.passes.select_rows import SELECT_ROWS
from tests.passes.graphs import ROPE, model, text_of, unrolled

Case = Callable[[], Graph]
LOWEST = "-3.4028234663852886e+38"


def graph(body: str, inputs: str = "%x: f32[B,S,16]", result: str = "y") -> Graph:
    """A graph in text, of one output."""
    return parse(f"graph g({inputs}) {{ dim B in 1..1..4 dim S in 1..8..64 {body} return {result} = %{result} }}")


def edited(source: Graph, *changes: tuple[str, str]) -> Graph:
    """A graph with pieces of its text replaced; each must occur."""
    text = text_of(source)
    for old, new in changes:
        assert old in text, f"{old!r} is not in\n{text}"
        text = text.replace(old, new)
    return parse(text)


def after(source: Graph, *passes: Pass) -> Graph:
    """A graph after some passes."""
    for item in passes:
        source = item.apply(source, Log())
    return source


# -- norms -----------------------------------------------------------------------------------------------------------

_NORM = """
    %square: f32[B,S,16] = mul(%x, %x)
    %mean: f32[B,S,1] = mean(%square)
    %eps: f32[B,S,1] = add(%mean, 1e-06)
    %rsqrt: f32[B,S,1] = rsqrt(%eps)
    %normed: f32[B,S,16] = mul(%x, %rsqrt)
    %weight: f32[16] = weight() {name = "norm.weight"}
    %y: f32[B,S,16] = mul(%normed, %weight)
"""
_LAYER_NORM = """
    %mean: f32[B,S,1] = mean(%x)
    %centred: f32[B,S,16] = sub(%x, %mean)
    %square: f32[B,S,16] = mul(%centred, %centred)
    %var: f32[B,S,1] = mean(%square)
    %eps: f32[B,S,1] = add(%var, 1e-05)
    %rsqrt: f32[B,S,1] = rsqrt(%eps)
    %normed: f32[B,S,16] = mul(%centred, %rsqrt)
    %weight: f32[16] = weight() {name = "norm.weight"}
    %scaled: f32[B,S,16] = mul(%normed, %weight)
"""
_BIAS = '%bias: f32[16] = weight() {name = "norm.bias"} %y: f32[B,S,16] = add(%scaled, %bias)'
_ONE_PLUS = (
    "%y: f32[B,S,16] = mul(%normed, %weight)",
    "%gain: f32[16] = add(%weight, 1.0) %y: f32[B,S,16] = mul(%normed, %gain)",
)
_OTHER = ("%normed: f32[B,S,16] = mul(%x, %rsqrt)", "%normed: f32[B,S,16] = mul(%square, %rsqrt)")
_MATRIX = (
    '%weight: f32[16] = weight() {name = "norm.weight"}',
    '%weight: f32[1,16] = weight() {name = "norm.weight"}',
)

FUSE_NORM_CASES: dict[str, Case] = {
    "rms_norm": lambda: graph(_NORM),
    "rms_norm_one_plus": lambda: graph(_NORM.replace(*_ONE_PLUS)),
    "rms_norm_operands_swapped": lambda: graph(
        _NORM.replace("mul(%x, %rsqrt)", "mul(%rsqrt, %x)")
        .replace("mul(%normed, %weight)", "mul(%weight, %normed)")
        .replace("add(%mean, 1e-06)", "add(1e-06, %mean)")
    ),
    "layer_norm": lambda: graph(_LAYER_NORM, result="scaled"),
    "layer_norm_bias": lambda: graph(_LAYER_NORM + _BIAS),
    "layer_norm_residual": lambda: graph(_LAYER_NORM + "%y: f32[B,S,16] = add(%scaled, %x)"),
    "in_repeat": lambda: model(attention=f"mask: causal, position: {ROPE}, qk_norm: {{eps: 1.0e-6}}").graph,
    "refused_used_elsewhere": lambda: graph(_NORM + "%z: f32[B,S,16] = mul(%y, %rsqrt)", result="z"),
    "refused_other_value": lambda: graph(_NORM.replace(*_OTHER)),
    "refused_gain_matrix": lambda: graph(_NORM.replace(*_MATRIX)),
    "refused_no_epsilon": lambda: graph(
        _NORM.replace("%eps: f32[B,S,1] = add(%mean, 1e-06)", "").replace("%eps", "%mean")
    ),
    "refused_no_gain": lambda: graph(_NORM, result="normed"),
}

# -- attention -------------------------------------------------------------------------------------------------------


def attention(options: str = f"mask: causal, position: {ROPE}", **config: int) -> Graph:
    """A one-layer model whose norms are fused: only the attention is left to see."""
    return after(model(attention=options, layers=1, **config).graph, FUSE_NORM)


_PLAIN = "position: {kind: none}"
_ALIBI = "mask: causal, position: {kind: alibi, scaled: false}"
_SCALED = "%attn.scaled: f32[B,2,2,S,S] = mul(%attn.scores, 0.35355339059327373)"
_BIASED = "%attn.biased: f32[B,2,2,S,S] = add(%attn.scaled, %alibi.bias)"


def _inner_alibi() -> Graph:
    return edited(
        attention(_ALIBI),
        (_SCALED, "%attn.scaled: f32[B,2,2,S,S] = add(%attn.scores, %alibi.bias)"),
        (_BIASED, "%attn.biased: f32[B,2,2,S,S] = mul(%attn.scaled, 0.35355339059327373)"),
    )


FUSE_ATTENTION_CASES: dict[str, Case] = {
    "mha": lambda: attention(kv_heads=4),
    "gqa": lambda: attention(),
    "mqa": lambda: attention(kv_heads=1),
    "full": lambda: attention(f"mask: full, {_PLAIN}"),
    "prefix": lambda: attention(f"mask: prefix, {_PLAIN}"),
    "window": lambda: attention(f"mask: causal, window: 3, {_PLAIN}"),
    "full_window": lambda: attention(f"mask: full, window: 3, {_PLAIN}"),
    "softcap": lambda: attention(f"mask: causal, softcap: 5.0, {_PLAIN}"),
    "alibi": lambda: attention(_ALIBI),
    "alibi_before_scale": _inner_alibi,
    "alibi_softcap_window": lambda: attention(f"{_ALIBI}, softcap: 4.0, window: 2"),
    "qk_norm": lambda: attention(f"mask: causal, position: {ROPE}, qk_norm: {{eps: 1.0e-6}}"),
    "scale_by_division": lambda: edited(
        attention(), ("mul(%attn.scores, 0.35355339059327373)", "div(%attn.scores, 2.5)")
    ),
    "no_scale": lambda: edited(attention(), (_SCALED, ""), ("%attn.scaled", "%attn.scores")),
    "mask_written_otherwise": lambda: edited(
        attention(f"mask: causal, window: 3, {_PLAIN}"),
        ('compare(%mask.key, 0) {kind = "ge"}', 'compare(%mask.key, -1) {kind = "gt"}'),
        ('compare(%mask.key, %mask.query) {kind = "le"}', 'compare(%mask.query, %mask.key) {kind = "ge"}'),
        ('compare(%mask.gap, 3) {kind = "lt"}', 'compare(3, %mask.gap) {kind = "gt"}'),
        ("and(%mask, %mask.near)", "and(%mask.near, %mask)"),
    ),
    "refused_no_padding_mask": lambda: edited(attention(), ("where(%mask,", "where(%mask.causal,")),
    "refused_unknown_mask": lambda: edited(
        attention(), ('compare(%mask.key, %mask.query) {kind = "le"}', 'compare(%mask.key, %mask.query) {kind = "lt"}')
    ),
    "refused_no_mask": lambda: edited(attention(), ("softmax(%attn.masked)", "softmax(%attn.scaled)")),
    "refused_masked_value": lambda: edited(attention(), (LOWEST, "-10000.0")),
    "refused_bias": lambda: edited(
        attention(_ALIBI),
        ("mul(%alibi.slopes, %alibi.key)", "maximum(%alibi.slopes, %alibi.key)"),
    ),
    "refused_slopes": lambda: edited(
        attention(_ALIBI, kv_heads=1),
        ("%alibi.slopes: f32[1,1,4,1,1]", "%alibi.slopes: f32[1,1,1,1,1]"),
        ("((((0.25)), ((0.0625)), ((0.015625)), ((0.00390625))))", "((((0.25))))"),
        ("%alibi.bias: f32[B,1,4,1,S]", "%alibi.bias: f32[B,1,1,1,S]"),
    ),
    "refused_scores_used_elsewhere": lambda: edited(
        attention(),
        ("%attn.joined", "%attn.kept"),
        (
            "    %attn.o.weight",
            "    %attn.sum: f32[B,2,2,S,1] = sum(%attn.softmax)\n"
            "    %attn.product: f32[B,2,2,S,8] = mul(%attn.mixed, %attn.sum)\n"
            "    %attn.turned: f32[B,S,2,2,8] = transpose(%attn.product) {axes = (-2, -4, -3, -1)}\n"
            '    %attn.again: f32[B,S,32] = reshape(%attn.turned) {shape = ("B", "S", 32)}\n'
            "    %attn.joined: f32[B,S,32] = add(%attn.kept, %attn.again)\n"
            "    %attn.o.weight",
        ),
        ("matmul(%attn.kept, %attn.o.weight)", "matmul(%attn.joined, %attn.o.weight)"),
    ),
    "refused_head_order": lambda: edited(
        attention(heads=6, kv_heads=3),
        ("f32[B,S,3,2,8]", "f32[B,S,2,3,8]"),
        ('shape = ("B", "S", 3, 2, 8)', 'shape = ("B", "S", 2, 3, 8)'),
        ("f32[B,3,2,S,8]", "f32[B,2,3,S,8]"),
        ("f32[B,3,2,S,S]", "f32[B,2,3,S,S]"),
        ("f32[B,S,3,1,8]", "f32[B,S,1,3,8]"),
        ('shape = ("B", "S", 3, 1, 8)', 'shape = ("B", "S", 1, 3, 8)'),
        ("f32[B,3,1,S,8]", "f32[B,1,3,S,8]"),
    ),
}

# -- joined products -------------------------------------------------------------------------------------------------


def mlp(options: str) -> Graph:
    """A one-layer model with this MLP, its attention and norms fused."""
    return after(model(mlp=options, layers=1).graph, FUSE_NORM, FUSE_ATTENTION)


_SILU = "{kind: gated_mlp, act: silu}"
_UP = "%mlp.up: f32[B,S,24] = matmul(%norm_2, %mlp.up.weight) {transpose_b = true}"

FUSE_GATED_MLP_CASES: dict[str, Case] = {
    "silu": lambda: mlp(_SILU),
    "gelu": lambda: mlp("{kind: gated_mlp, act: gelu}"),
    "gelu_tanh_bias": lambda: mlp("{kind: gated_mlp, act: gelu_tanh, bias: true}"),
    "relu": lambda: mlp("{kind: gated_mlp, act: relu}"),
    "refused_not_gated": lambda: mlp("{kind: mlp, act: gelu, bias: true}"),
    "refused_other_input": lambda: edited(mlp(_SILU), (_UP, _UP.replace("%norm_2,", "%x,"))),
    "refused_used_elsewhere": lambda: edited(
        mlp(_SILU),
        ("mul(%mlp.act, %mlp.up)", "mul(%mlp.act, %mlp.twice)"),
        (_UP, _UP + "\n%mlp.twice: f32[B,S,24] = add(%mlp.up, %mlp.gate)"),
    ),
    "gate_read_elsewhere": lambda: edited(
        mlp(_SILU),
        ("matmul(%mlp.hidden, %mlp.down.weight)", "matmul(%mlp.more, %mlp.down.weight)"),
        ("    %mlp.down.weight", "    %mlp.more: f32[B,S,24] = add(%mlp.hidden, %mlp.gate)\n    %mlp.down.weight"),
    ),
    "refused_weight_computed": lambda: edited(
        mlp(_SILU),
        (_UP, f"%mlp.scaled: f32[24,16] = mul(%mlp.up.weight, 2.0)\n{_UP.replace('up.weight', 'scaled')}"),
    ),
}


def qkv(options: str = f"mask: causal, position: {ROPE}", **config: int) -> Graph:
    """A one-layer model whose norms and attention are fused."""
    return after(attention(options, **config), FUSE_ATTENTION)


_BIASES = ", bias: {qkv: true, out: false}"
_V = "%attn.v: f32[B,S,16] = matmul(%norm_1, %attn.v.weight) {transpose_b = true}"

FUSE_QKV_CASES: dict[str, Case] = {
    "mha": lambda: qkv(kv_heads=4),
    "gqa": lambda: qkv(),
    "bias": lambda: qkv(f"mask: causal, position: {ROPE}{_BIASES}"),
    "qk_norm": lambda: after(
        qkv(f"mask: causal, position: {ROPE}, qk_norm: {{eps: 1.0e-6, gain: one_plus}}"), FUSE_NORM
    ),
    "paged": lambda: after(qkv(), INSERT_KV_CACHE),
    "refused_other_input": lambda: edited(qkv(), (_V, _V.replace("%norm_1", "%x.in"))),
    "refused_half_biased": lambda: edited(
        qkv(f"mask: causal, {_PLAIN}{_BIASES}"),
        ("%attn.v.2: f32[B,S,16] = add(%attn.v, %attn.v.bias)", ""),
        ("reshape(%attn.v.2)", "reshape(%attn.v)"),
    ),
    "refused_already_joined": lambda: after(qkv(), FUSE_QKV),
    "refused_used_elsewhere": lambda: edited(
        qkv(f"mask: causal, {_PLAIN}{_BIASES}"),
        ("%attn.v.2: f32[B,S,16] = add(%attn.v, %attn.v.bias)", "%attn.v.2: f32[B,S,16] = add(%attn.v, %attn.v.bias)\n"
         "%extra: f32[B,S,16] = mul(%attn.v, %x.in)"),
        ("add(%x.in, %attn.o)", "add(%extra, %attn.o)"),
    ),
}  # fmt: skip

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
    "refused_encoder": lambda: fused(attention=f"mask: full, {_PLAIN}"),
    "refused_mixed": mixed,
    "refused_not_fused": lambda: after(model().graph, FUSE_NORM),
    "refused_half_fused": lambda: after(_half_fused(), FUSE_ATTENTION),
    "refused_name_taken": lambda: edited(
        fused(), ("%positions: i32[B,S])", "%positions: i32[B,S], %past_lens: i32[B])")
    ),
}

PACK_TOKENS_CASES: dict[str, Case] = {
    "decoder": cached,
    "prefix": lambda: cached(attention=f"mask: prefix, position: {ROPE}"),
    "layer_norm": lambda: after(
        model(norm="{kind: layer_norm, eps: 1.0e-5, bias: true}", mlp="{kind: mlp, act: gelu}").graph,
        FUSE_ATTENTION,
        INSERT_KV_CACHE,
    ),
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
    "refused_no_tokens": lambda: graph(_NORM),
}

SELECT_ROWS_CASES: dict[str, Case] = {
    "final_norm_and_head": packed,
    "unrolled": lambda: after(unrolled(fused()), INSERT_KV_CACHE, PACK_TOKENS),
    "hidden_states_too": lambda: packed(output="hidden = norm_f(x)\n  - logits = head(hidden)"),
    "refused_not_packed": cached,
    "refused_no_logits": lambda: edited(packed(), ("return logits =", "return hidden =")),
    "refused_twice": lambda: after(packed(), SELECT_ROWS),
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

CASES: dict[str, tuple[Pass, Case]] = {
    f"{item.name}/{name}": (item, case)
    for item, cases in (
        (FUSE_NORM, FUSE_NORM_CASES),
        (FUSE_ATTENTION, FUSE_ATTENTION_CASES),
        (FUSE_GATED_MLP, FUSE_GATED_MLP_CASES),
        (FUSE_QKV, FUSE_QKV_CASES),
        (INSERT_KV_CACHE, INSERT_KV_CACHE_CASES),
        (PACK_TOKENS, PACK_TOKENS_CASES),
        (SELECT_ROWS, SELECT_ROWS_CASES),
        (FOLD_CONSTANTS, FOLD_CONSTANTS_CASES),
    )
    for name, case in cases.items()
}
CASES |= {
    f"assign_precision/{name}": (assign_precision(precision), case)
    for name, (precision, case) in ASSIGN_PRECISION_CASES.items()
}
