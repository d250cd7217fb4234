"""Matrices of experts as codes: which a kernel reads, and the lines of expert_source.py that read them.

Codes of 4 bits and INT8 lie in words and become weights in registers, as in widened.py; E4M3 lies in bytes, and what
its codes make is scaled block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compiler.ir.core import Equation, Value
from compiler.kernels.attention import power
from compiler.kernels.products import LEAST_FP8, NIBBLES, SCALES, SPAN, group_of, in_words
from compiler.kernels.row_source import RefusedError


@dataclass(frozen=True)
class Lines:
    """Before the loop over columns and in it, and the product of a tile [rows, outs] as text."""

    before: Sequence[str]
    inner: Sequence[str]
    result: str


def expert_in_words(product: Equation, weight: Equation) -> bool:
    """Whether the codes of an expert's matrices lie in words."""
    return in_words(product.values[0].type.dtype, weight.values[0].type.dtype, group_of(weight))


def why_not_read(codes: str, scale: str, group: int, ins: int, *, outer: bool = False) -> str | None:
    """Why no kernel reads matrices of experts [outs, ins] that are stored so, or None."""
    if codes not in (*NIBBLES, "i8", "f8e4m3") or scale not in SCALES or scale == "f8e4m3" or outer:
        return f"no kernel of experts reads {codes} with scales of {scale}{' and an outer scale' if outer else ''}"
    least = SPAN // 2 if codes == "i8" else 32
    if group and (group < least or group != power(group) or ins % group):
        return f"no kernel of experts reads {codes} with a scale for {group} of {ins} columns"
    return None


def depth_of(weight: Equation, depth: int) -> int:
    """Columns that are multiplied at once: a span of words, or bytes that share a scale."""
    codes = weight.values[0].type.dtype
    return min(depth, group_of(weight) or depth) if codes == "f8e4m3" else SPAN


def codes_read(
    weight: Equation, number: int, x: str, architecture: int, argument: Callable[..., str], inside: Sequence[str]
) -> Lines:
    """The lines for one of the products of a group; raises RefusedError for codes that no kernel reads."""
    codes, scale, zero, outer = (*weight.args, None, None)[:4]
    assert isinstance(codes, Value)
    assert isinstance(scale, Value)
    group, (_, outs, ins) = group_of(weight), codes.type.static_shape()
    why = why_not_read(codes.type.dtype, scale.type.dtype, group, ins, outer=outer is not None)
    if why is not None or x not in ("f16", "bf16"):
        raise RefusedError(why or f"codes of experts under inputs of {x}")
    acc, by_rows = f"acc{number}", scale.type.shape[1]
    before = [f"{acc} = tl.zeros([tile, rows], tl.float32)"]
    s = argument(f"s{number}", scale, SCALES[scale.type.dtype])
    result = f"tl.trans({acc})"
    if not group:
        at = "expert * outs + n" if by_rows == outs else f"expert + n * {0 if by_rows == 1 else 1}"
        result = f"(tl.trans({acc}) * scale_of(tl.load({s} + {at}, mask=n < outs, other=0))[None, :])"
    if codes.type.dtype == "f8e4m3":
        block = weight.attr.get("block")
        tall = int(str(block[-2])) if isinstance(block, tuple) else 0
        return _bytes(codes, (s, tall, group), number, x, architecture, argument, inside, before, result)
    w, z = argument(f"w{number}", codes, "u8"), "None"
    if isinstance(zero, Value):
        z = argument(f"z{number}", zero, "i8" if codes.type.dtype == "i4" else "u8")
    if by_rows != outs:
        raise RefusedError(
            f"{codes.type.dtype} of experts with a scale for {'all' if by_rows == 1 else 'several'} rows"
        )
    piece, size = SPAN // (2 if codes.type.dtype == "i8" else 4) // 2, -(-ins // SPAN)
    where = f"(expert * outs + n.to(tl.int64))[:, None] * {size * piece} + tl.arange(0, {piece})[None, :]"
    groups = ins // group if group else 1
    own = f"{s} + expert * {groups * outs}"
    zeros = f"{z} + expert * {groups * outs}" if z != "None" else z
    before.append(f"ws{number} = {w}.to(tl.pointer_type(tl.uint32)) + {where}")
    mask = ", mask=(n < outs)[:, None], other=0" if any("n <" in text for text in inside) else ""
    inner = [
        f"word{number} = tl.load(ws{number} + first // {SPAN} * {piece}{mask})",
        f"wide{number} = span_in(word{number}, '{codes.type.dtype}', {own}, {zeros}, first, tl.program_id(0) * tile, "
        f"outs, ins, {group}, tile, {SPAN}, narrow.dtype)",
        f"{acc} = tl.dot(wide{number}, tl.trans(narrow), {acc})",
    ]
    return Lines(before, inner, result)


def _bytes(
    codes: Value, scale: tuple[str, int, int], number: int, x: str, architecture: int, argument: Callable[..., str],
    inside: Sequence[str], before: list[str], result: str,
) -> Lines:  # fmt: skip
    """E4M3, a byte a code; scales for blocks of rows and columns, or of whole rows."""
    (s, tall, group), (_, outs, ins) = scale, codes.type.static_shape()
    by_bits = architecture < LEAST_FP8
    w = argument(f"w{number}", codes, "u8" if by_bits else "")
    before.append(f"ws{number} = {w} + (expert * outs + n.to(tl.int64))[:, None] * ins + d[None, :]")
    mask = f", mask={' & '.join(inside)}, other=0.0" if inside else ""
    wide = f"tl.load(ws{number} + first{mask})"
    wide = f"(plain({wide}, 'f8e4m3') * 256.0)" if by_bits else wide
    made = f"{wide}.to(tl.float32).to(tl.bfloat16)" if x == "bf16" else f"{wide}.to(tl.float16)"
    inner = [f"wide{number} = {made}"]
    if not group:
        return Lines(before, [*inner, f"acc{number} = tl.dot(wide{number}, tl.trans(narrow), acc{number})"], result)
    at = f"(expert * {-(-outs // tall)} + n // {tall}) * {ins // group} + first // {group}"
    step = f"scale_of(tl.load({s} + {at}, mask=n < outs, other=0))[:, None]"
    inner.append(f"acc{number} += tl.dot(wide{number}, tl.trans(narrow)) * {step}")
    return Lines(before, inner, result)
