"""How an attention knows positions: the kinds of `position:`."""

from __future__ import annotations

from typing import Annotated, ClassVar, get_args

from pydantic import Field

from specs.kinds import Kind, pick
from specs.node import BoolExpr, FloatExpr, IntExpr, IntOrNone, Options, StrExpr, Text, ValueExpr

RopeStyle = Annotated[StrExpr, Options(("half", "interleaved"))]
Stored = Annotated[StrExpr, Options(("f32", "f16"))]


class NoPosition(Kind):
    """The attention knows no positions (they enter elsewhere, or not at all)."""

    title: ClassVar[str] = "position"
    kind: Text = "none"


class Rope(Kind):
    """Rotary embedding of queries and keys: angle(p, i) = p * theta^(-2i/dims) for i < dims/2, on the first
    `dims` of each head.
    """

    title: ClassVar[str] = "rope position"
    kind: Text = "rope"
    style: RopeStyle = Field(description="half pairs i with i + dims/2; interleaved pairs 2i with 2i + 1")
    dims: IntExpr = Field(description="rotated dimensions of each head; the rest pass through; 0: none rotates")
    theta: FloatExpr = Field(description="base of the frequencies")
    scaling: ValueExpr | None = Field(
        None, description="the checkpoint's rope scaling mapping or none; formulas in rope_scaling.yaml"
    )
    context: IntExpr | None = Field(
        None, description="trained context, for scalings whose mapping leaves it to the model's maximum"
    )
    original: IntOrNone | None = Field(None, description="context before scaling, where it stands beside the mapping")


class Alibi(Kind):
    """A bias slope[head] * key position added to the scores (ALiBi, arXiv:2108.12409).

    The slopes are 2^(-max_bias (j+1) / n) for the first n heads, n the largest power of two in `heads`, then
    2^(-max_bias (2j+1) / 2n).
    """

    title: ClassVar[str] = "alibi position"
    kind: Text = "alibi"
    scaled: BoolExpr = Field(description="true: the bias is added before the scale is applied; false: after")
    max_bias: FloatExpr | None = Field(None, description="left out: 8, the paper's")
    rounded: BoolExpr | None = Field(
        None, description="slope, position and their product are rounded to bfloat16; left out: no"
    )


class BlockRope(Kind):
    """Rotary embedding by the positions of blank infilling (arXiv:2103.10360, section 2.1).

    Two streams: the first counts tokens up to `prefix`, from where it stays at the place of the blank; the second is 0
    before `prefix` and 1, 2, ... from there. Each turns its share of a head, the first half and the second. One stream:
    the first alone, on the whole head; where `counting` is above 0 it goes on counting. `prefix`, `blank` and
    `counting` are inputs of each sequence (see `derive`).
    """

    title: ClassVar[str] = "block_rope position"
    kind: Text = "block_rope"
    style: RopeStyle = Field(description="half pairs i with i + dims/2; interleaved pairs 2i with 2i + 1")
    dims: IntExpr = Field(description="rotated dimensions of each stream's share; the rest pass through")
    theta: FloatExpr = Field(description="base of the frequencies")
    streams: IntExpr = Field(description="1 or 2")
    stored: Stored | None = Field(None, description="type that the frequencies are rounded to; left out: f32")


PositionKind = NoPosition | Rope | BlockRope | Alibi
POSITION_CLASSES: tuple[type[Kind], ...] = get_args(PositionKind)
Position = Annotated[PositionKind, pick("position", POSITION_CLASSES)]
