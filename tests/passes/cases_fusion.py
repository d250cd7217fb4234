"""Cases of the fusion passes. Refused ones are mostly graphs that fire, with one line of their text changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from compiler.ir import Graph
from compiler.passes.fuse_attention import FUSE_ATTENTION
from compiler.passes.fuse_norm import FUSE_NORM
from compiler.passes.fuse_qkv import FUSE_QKV
from compiler.passes.insert_kv_cache import INSERT_KV_CACHE
from tests.passes.graphs import LOWEST, ROPE, after, edited, graph, model

Case = Callable[[], Graph]
PLAIN = "position: {kind: none}"

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
    # its normalisation of the centred values still is an RMS norm
    "rms_norm_in_layer_norm_read_elsewhere": lambda: graph(
        _LAYER_NORM + "%z: f32[B,S,16] = mul(%scaled, %centred)", result="z"
    ),
    "layer_norm_plain": lambda: graph(_LAYER_NORM, result="normed"),
    "layer_norm_plain_read_elsewhere": lambda: graph(
        _LAYER_NORM + "%z: f32[B,S,16] = mul(%scaled, %normed)", result="z"
    ),
    "layer_norm_plain_gain_matrix": lambda: graph(_LAYER_NORM.replace(*_MATRIX) + _BIAS),
    "refused_layer_norm_used_elsewhere": lambda: graph(
        _LAYER_NORM + "%z: f32[B,S,16] = mul(%scaled, %rsqrt)", result="z"
    ),
    "refused_layer_norm_bias_used_elsewhere": lambda: graph(
        _LAYER_NORM + _BIAS + "%z: f32[B,S,16] = mul(%y, %rsqrt)", result="z"
    ),
    "refused_layer_norm_plain_used_elsewhere": lambda: graph(
        _LAYER_NORM.partition("    %weight")[0] + "%z: f32[B,S,16] = add(%normed, %rsqrt)", result="z"
    ),
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


_ALIBI = "mask: causal, position: {kind: alibi, scaled: false}"
_SCALED = "%attn.scaled: f32[B,2,2,S,S] = mul(%attn.scores, 0.35355339059327373)"

FUSE_ATTENTION_CASES: dict[str, Case] = {
    "mha": lambda: attention(kv_heads=4),
    "gqa": lambda: attention(),
    "mqa": lambda: attention(kv_heads=1),
    "full": lambda: attention(f"mask: full, {PLAIN}"),
    "prefix": lambda: attention(f"mask: prefix, {PLAIN}"),
    "window": lambda: attention(f"mask: causal, window: 3, {PLAIN}"),
    "full_window": lambda: attention(f"mask: full, window: 3, {PLAIN}"),
    "softcap": lambda: attention(f"mask: causal, softcap: 5.0, {PLAIN}"),
    "alibi": lambda: attention(_ALIBI),
    "alibi_before_scale": lambda: attention(_ALIBI.replace("false", "true")),
    "alibi_bfloat16": lambda: attention(_ALIBI.replace("scaled: false", "scaled: true, max_bias: 6.0, rounded: true")),
    "alibi_softcap_window": lambda: attention(f"{_ALIBI}, softcap: 4.0, window: 2"),
    "clip": lambda: attention(f"{_ALIBI}, clip: 0.5"),
    "qk_norm": lambda: attention(f"mask: causal, position: {ROPE}, qk_norm: {{eps: 1.0e-6}}"),
    "sinks": lambda: attention(f"mask: causal, sinks: true, {PLAIN}"),
    "sinks_window_softcap": lambda: attention(f"mask: causal, sinks: true, window: 3, softcap: 5.0, {PLAIN}"),
    "scale_by_division": lambda: edited(
        attention(), ("mul(%attn.scores, 0.35355339059327373)", "div(%attn.scores, 2.5)")
    ),
    "no_scale": lambda: edited(attention(), (_SCALED, ""), ("%attn.scaled", "%attn.scores")),
    "mask_written_otherwise": lambda: edited(
        attention(f"mask: causal, window: 3, {PLAIN}"),
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
    "refused_sinks": lambda: edited(
        attention(f"mask: causal, sinks: true, {PLAIN}"),
        ("%attn.sinks.weight: f32[4]", "%attn.sinks.weight: f32[2]"),
        ("%attn.sink: f32[2,2,1,1]", "%attn.sink: f32[1,2,1,1]"),
        ("shape = (2, 2, 1, 1)", "shape = (1, 2, 1, 1)"),
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
_ACTIVATIONS = {"silu": "", "gelu": "{approximate = true}", "relu": "", "sigmoid": "", "tanh": ""}


def gated(act: str, *, bias: bool, up: str = "x") -> Graph:
    """act(gate x) * up x, the up product on a value that may be another."""
    plain = f"""
        %other: f32[B,S,16] = exp(%x)
        %gate.weight: f32[24,16] = weight() {{name = "gate.weight"}}
        %gate: f32[B,S,24] = matmul(%x, %gate.weight) {{transpose_b = true}}
        %up.weight: f32[24,16] = weight() {{name = "up.weight"}}
        %up: f32[B,S,24] = matmul(%{up}, %up.weight) {{transpose_b = true}}
        %act: f32[B,S,24] = {act}(%gate) {_ACTIVATIONS[act]}
        %y: f32[B,S,24] = mul(%up, %act)
    """
    if not bias:
        return graph(plain)
    for name, user in (("gate", f"{act}(%gate)"), ("up", "mul(%up, ")):
        added = f"""
            %{name}.bias: f32[24] = weight() {{name = "{name}.bias"}}
            %{name}.2: f32[B,S,24] = add(%{name}, %{name}.bias)
            %"""
        line = {"gate": "%act: ", "up": "%y: "}[name]
        plain = plain.replace(line, added.strip() + line[1:]).replace(user, user.replace(f"%{name}", f"%{name}.2"))
    return graph(plain)


FUSE_GATED_MLP_CASES: dict[str, Case] = {
    "in_a_model": lambda: mlp(_SILU),
    "gate_read_elsewhere": lambda: edited(
        mlp(_SILU),
        ("matmul(%mlp.hidden, %mlp.down.weight)", "matmul(%mlp.more, %mlp.down.weight)"),
        ("    %mlp.down.weight", "    %mlp.more: f32[B,S,24] = add(%mlp.hidden, %mlp.gate)\n    %mlp.down.weight"),
    ),
    "refused_not_gated": lambda: mlp("{kind: mlp, act: gelu, bias: true}"),
    "refused_used_elsewhere": lambda: edited(
        mlp(_SILU),
        ("mul(%mlp.act, %mlp.up)", "mul(%mlp.act, %mlp.twice)"),
        (_UP, _UP + "\n%mlp.twice: f32[B,S,24] = add(%mlp.up, %mlp.gate)"),
    ),
    "refused_weight_computed": lambda: edited(
        mlp(_SILU),
        (_UP, f"%mlp.scaled: f32[24,16] = mul(%mlp.up.weight, 2.0)\n{_UP.replace('up.weight', 'scaled')}"),
    ),
}
for _act in _ACTIVATIONS:
    for _bias in (False, True):
        _name = f"{_act}_bias" if _bias else _act
        FUSE_GATED_MLP_CASES[_name] = partial(gated, _act, bias=_bias)
        FUSE_GATED_MLP_CASES[f"refused_{_name}_other_input"] = partial(gated, _act, bias=_bias, up="other")


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
        qkv(f"mask: causal, {PLAIN}{_BIASES}"),
        ("%attn.v.2: f32[B,S,16] = add(%attn.v, %attn.v.bias)", ""),
        ("reshape(%attn.v.2)", "reshape(%attn.v)"),
    ),
    "refused_already_joined": lambda: after(qkv(), FUSE_QKV),
    "refused_used_elsewhere": lambda: edited(
        qkv(f"mask: causal, {PLAIN}{_BIASES}"),
        ("%attn.v.2: f32[B,S,16] = add(%attn.v, %attn.v.bias)", "%attn.v.2: f32[B,S,16] = add(%attn.v, %attn.v.bias)\n"
         "%extra: f32[B,S,16] = mul(%attn.v, %x.in)"),
        ("add(%x.in, %attn.o)", "add(%extra, %attn.o)"),
    ),
}  # fmt: skip
