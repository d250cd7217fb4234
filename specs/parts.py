"""The kinds of parts of a model: a closed union. A new kind is one class here, one entry in `Part`, one builder.

Every field is an expression over the names of `config:` and, for parts used inside `repeat`, `layer` (from 0). What a
field leaves out, the model does not have; no default hides a fact.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, get_args

from pydantic import Field

from specs.kinds import Kind, pick
from specs.node import (
    BoolExpr,
    Dim,
    FloatExpr,
    FloatOrNone,
    IntExpr,
    IntOrNone,
    Node,
    Options,
    StrExpr,
    Text,
)
from specs.positions import POSITION_CLASSES, Position

_SPELLINGS = {  # names in config.json (transformers activations.py), which `act: hidden_act` then may have
    "swish": "silu",
    "gelu_python": "gelu",
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"), "gelu_tanh"),
}
Activation = Annotated[StrExpr, Options(("silu", "gelu", "gelu_tanh", "relu", "relu2", "tanh"), _SPELLINGS)]
Mask = Annotated[StrExpr, Options(("causal", "full", "prefix"))]
Gain = Annotated[StrExpr, Options(("weight", "one_plus"))]
LayerGain = Annotated[StrExpr, Options(("weight", "one_plus", "one"))]
QkNormKind = Annotated[StrExpr, Options(("rms_norm", "layer_norm"))]


class PartBase(Kind):
    """What all parts share; `inputs` and `outputs` are how many values a call takes and gives, `leaves` its
    weights' names.
    """

    inputs: ClassVar[int] = 1
    outputs: ClassVar[int] = 1
    leaves: ClassVar[tuple[str, ...]] = ("",)


class Tied(Node):
    """The part uses another part's weight when `when` holds."""

    title: ClassVar[str] = "`tied`"
    to: Text = Field(description="the part whose weight it is")
    when: BoolExpr


class Embedding(PartBase):
    """A table lookup: int ids [B, S] to rows [B, S, width]. Weight [rows, width].

    Of `positions` it makes a learned position embedding.
    """

    title: ClassVar[str] = "embedding"
    kind: Text = "embedding"
    rows: IntExpr = Field(description="rows of the table")
    width: IntExpr | None = Field(None, description="width of a row; left out: d_model")
    offset: IntExpr | None = Field(None, description="row = id + offset; left out: 0")


class Linear(PartBase):
    """y = act(x W^T (+ b)). Weight [out, in]."""

    title: ClassVar[str] = "linear"
    kind: Text = "linear"
    out: IntExpr = Field(description="width of the result")
    act: Activation | None = Field(None, description="left out: none")
    bias: BoolExpr | None = Field(None, description="whether it adds a bias; left out: no")
    unit_rows: BoolExpr | None = Field(None, description="whether W's rows are divided by their L2 norms; left out: no")
    tied: Tied | None = Field(None, description="shares an embedding's table as its weight")


class RmsNorm(PartBase):
    """y = x / sqrt(mean(x^2) + eps) * gain, statistics in float32 (arXiv:1910.07467). Weight [d]."""

    title: ClassVar[str] = "rms_norm"
    kind: Text = "rms_norm"
    eps: FloatExpr
    gain: Gain | None = Field(None, description="weight: gain = w; one_plus: gain = 1 + w; left out: weight")


class LayerNorm(PartBase):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * gain (+ b), statistics in float32 (arXiv:1607.06450). Weight
    [d].
    """

    title: ClassVar[str] = "layer_norm"
    kind: Text = "layer_norm"
    eps: FloatExpr
    centre: BoolExpr | None = Field(None, description="false: an rms_norm, the mean stays; left out: yes")
    bias: BoolExpr | None = Field(None, description="whether it adds a bias; left out: no")
    gain: LayerGain | None = Field(
        None, description="weight: gain = w; one_plus: gain = 1 + w; one: no weight; left out: weight"
    )


class AttentionBias(Node):
    """Which projections of an attention add a bias."""

    title: ClassVar[str] = "attention bias"
    qkv: BoolExpr = Field(description="biases on the q, k and v projections")
    out: BoolExpr = Field(description="bias on the output projection")


class QkNorm(Node):
    """A norm over each query and key head, before the rotation."""

    title: ClassVar[str] = "qk_norm"
    norm: QkNormKind | None = Field(None, description="layer_norm has a bias; left out: rms_norm")
    when: BoolExpr | None = Field(None, description="whether the model has it; left out: yes")
    eps: FloatExpr
    gain: Gain | None = Field(None, description="weight: gain = w; one_plus: gain = 1 + w; left out: weight")


class Attention(PartBase):
    """softmax(scale * q k^T + mask) v, heads sharing keys and values in groups (arXiv:1706.03762,
    arXiv:2305.13245).

    Leaves q [heads d_head, d], k and v [kv_heads d_head, d], o [d, heads d_head]; q_norm and k_norm [d_head];
    sinks [heads].
    """

    title: ClassVar[str] = "attention"
    kind: Text = "attention"
    leaves: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o", "q_norm", "k_norm", "sinks")
    heads: Dim
    kv_heads: Dim
    d_head: Dim
    mask: Mask = Field(
        description="causal; full: every token sees every other; prefix: full in the prompt's prefix, then causal"
    )
    window: IntOrNone | None = Field(None, description="keys j of query i: i - window < j <= i; left out or none: all")
    position: Position
    bias: AttentionBias | None = Field(None, description="left out: no biases")
    scale: FloatExpr | None = Field(None, description="factor on q k^T; left out: d_head ** -0.5, the paper's")
    softcap: FloatOrNone | None = Field(
        None, description="scores become c * tanh(scores / c); left out or none: no cap"
    )
    qk_norm: QkNorm | None = None
    clip: FloatOrNone | None = Field(
        None, description="q, k and v are clamped to -clip..clip; left out or none: not at all"
    )
    sinks: BoolExpr | None = Field(
        None, description="one learned logit per head joins the softmax and is dropped; left out: no"
    )


class Mlp(PartBase):
    """y = down(act(up(x))). Leaves up [d_ffn, d], down [d, d_ffn]."""

    title: ClassVar[str] = "mlp"
    kind: Text = "mlp"
    leaves: ClassVar[tuple[str, ...]] = ("up", "down")
    d_ffn: Dim
    act: Activation
    bias: BoolExpr | None = Field(None, description="biases on both; left out: no")


class GatedMlp(PartBase):
    """y = down(act(gate(x)) * up(x)) (arXiv:2002.05202). Leaves gate and up [d_ffn, d], down [d, d_ffn]."""

    title: ClassVar[str] = "gated_mlp"
    kind: Text = "gated_mlp"
    leaves: ClassVar[tuple[str, ...]] = ("gate", "up", "down")
    d_ffn: Dim
    act: Activation
    bias: BoolExpr | None = Field(None, description="biases on all three; left out: no")


class LatentAttention(PartBase):
    """Attention over keys and values made from one small latent (MLA, arXiv:2405.04434, section 2.1); each head is
    [d_nope | d_rope], and all heads share one rotated key. Both latents pass an RMS norm.

    Leaves q_a [q_rank, d] and q_norm [q_rank] where queries have a latent, q_nope [heads d_nope, q_rank or d] and
    q_rope [heads d_rope, q_rank or d]; kv_a [kv_rank, d], k_rope [d_rope, d], kv_norm [kv_rank], k_nope [heads d_nope,
    kv_rank], v [heads d_v, kv_rank]; o [d, heads d_v].
    """

    title: ClassVar[str] = "latent_attention"
    kind: Text = "latent_attention"
    leaves: ClassVar[tuple[str, ...]] = (
        "q_a", "q_norm", "q_nope", "q_rope", "kv_a", "kv_norm", "k_rope", "k_nope", "v", "o",
    )  # fmt: skip
    heads: Dim
    d_nope: IntExpr = Field(description="dimensions of each head that are not rotated")
    d_rope: IntExpr = Field(description="dimensions of each head that are rotated")
    d_v: IntExpr = Field(description="dimensions of each value head")
    q_rank: IntOrNone | None = Field(None, description="width of the queries' latent; left out or none: they have none")
    kv_rank: IntExpr = Field(description="width of the latent of keys and values")
    eps: FloatExpr = Field(description="of both latents' norms")
    mask: Mask
    window: IntOrNone | None = Field(None, description="as in `attention`")
    position: Position = Field(description="of the rotated dimensions")
    bias: BoolExpr | None = Field(None, description="biases on q_a, kv_a, k_rope and o; left out: no")
    scale: FloatExpr | None = Field(None, description="factor on q k^T; left out: (d_nope + d_rope) ** -0.5")


class Router(Node):
    """Which experts each token goes to, and how much each counts: `top_k` of scores W x, largest first."""

    title: ClassVar[str] = "router"
    score: Annotated[StrExpr, Options(("softmax", "sigmoid", "softmax_of_chosen"))] = Field(
        description="softmax, sigmoid: of all experts' W x; softmax_of_chosen: of the chosen alone, after the choice"
    )
    bias: BoolExpr | None = Field(None, description="W x + b; left out: no")
    correction: BoolExpr | None = Field(
        None, description="a learned number for each expert is added to its score for the choice only; left out: no"
    )
    groups: IntOrNone | None = Field(
        None, description="experts stand in this many groups, and only those of the best are looked at; none: no groups"
    )
    top_groups: IntOrNone | None = Field(None, description="how many groups are looked at")
    group_best: IntExpr | None = Field(None, description="a group's score is the sum of this many of its best")
    renormalise: BoolExpr | None = Field(None, description="weights are divided by their sum; left out: no")
    scale: FloatExpr | None = Field(None, description="factor on the weights; left out: 1")


class GatedExpert(Kind):
    """down(act(gate(x)) * up(x))."""

    title: ClassVar[str] = "gated expert"
    kind: Text = "gated"
    act: Activation


class ClampedExpert(Kind):
    """down((up + 1) * gate * sigmoid(alpha * gate)), gate at most `limit`, up within +-limit."""

    title: ClassVar[str] = "clamped expert"
    kind: Text = "clamped"
    alpha: FloatExpr
    limit: FloatExpr


ExpertKind = GatedExpert | ClampedExpert
EXPERT_CLASSES: tuple[type[Kind], ...] = get_args(ExpertKind)


class Moe(PartBase):
    """A mixture of experts (arXiv:1701.06538): the chosen experts' results, times their weights, summed. An expert that
    all tokens share is a part of its own.

    Leaves router [experts, d], correction [experts]; gate and up [experts, d_ffn, d], down [experts, d, d_ffn].
    """

    title: ClassVar[str] = "moe"
    kind: Text = "moe"
    leaves: ClassVar[tuple[str, ...]] = ("router", "correction", "gate", "up", "down")
    experts: IntExpr
    top_k: IntExpr = Field(description="experts for each token")
    d_ffn: Dim
    router: Router
    expert: Annotated[ExpertKind, pick("expert", EXPERT_CLASSES)]
    bias: BoolExpr | None = Field(None, description="biases on gate, up and down; left out: no")


Part = Embedding | Linear | RmsNorm | LayerNorm | Attention | Mlp | GatedMlp | LatentAttention | Moe
ATTENTIONS = (Attention, LatentAttention)
"""The parts in which tokens see each other; what their `mask` says decides the role of a model."""
PART_CLASSES: tuple[type[PartBase], ...] = get_args(Part)
NODE_CLASSES: tuple[type[Node], ...] = (
    *PART_CLASSES,
    *POSITION_CLASSES,
    *EXPERT_CLASSES,
    AttentionBias,
    QkNorm,
    Router,
    Tied,
)
"""Every class that a part is made of."""
AnyPart = Annotated[Part, pick("part", PART_CLASSES)]
