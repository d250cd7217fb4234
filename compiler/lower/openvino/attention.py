"""Attention in OpenVINO: with a paged cache natively, or over gathered blocks; and without a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as ops
import torch
from openvino.op import _PagedAttentionExtension as PagedAttentionExtension

from compiler.ir.core import Equation
from compiler.lower.capability import Emit
from compiler.lower.openvino import cache_rows
from compiler.lower.openvino.capabilities import verdict
from compiler.lower.openvino.emitter import Emitter, emits, identity
from compiler.lower.openvino.operations import axes, operand, reshaped, shape_of, softmax_with

MASKED = -3.4028234663852886e38  # float32's lowest, as the IR's attention says
MASK_TERM = -3.3895313892515355e38  # bfloat16's lowest: the mask is added, and a bf16 engine may round it


@emits("paged_attention")
def paged_attention(e: Emitter, equation: Equation) -> ov.Output:
    native = isinstance(verdict(equation), Emit)
    out = _native(e, equation, everything=native)
    if native:
        heads, wide = shape_of(operand(equation, 0))[-2], shape_of(operand(equation, 2))[-1]
        return reshaped(out, (), (*_rows(equation), heads, wide))
    # Kept alive as an output for its effect: it appends the new keys and values to the cache. What it writes is behind
    # past_lens, what is gathered is before, so their order is free.
    e.extra.append((f"{_cache_name(e, equation)}.written", out))
    return _gathered(e, equation)


def _rows(equation: Equation) -> tuple[int | str, ...]:
    return shape_of(operand(equation, 0))[:-2]


def _cache_name(e: Emitter, equation: Equation) -> str:
    return str(e.node(equation.args[3]).get_any_name())


def _native(e: Emitter, equation: Equation, *, everything: bool) -> ov.Output:
    """PagedAttentionExtension [T, H*E]; without `everything` only what it does to the cache is wanted."""

    def empty(dtype: Any) -> ov.Output:
        name = np.dtype(dtype).name
        return e.memo(("empty", name), lambda: ops.constant(np.zeros(0, dtype)).output(0))

    def scalar(number: int) -> ov.Output:
        return e.memo(("i32", number), lambda: ops.constant(np.int32(number)).output(0))

    attr = equation.attr
    q, k, v = (
        ops.reshape(e.node(operand(equation, index)), axes(-1, *_joined(equation, index)), False).output(0)
        for index in range(3)
    )
    slopes = attr.get("slopes") if everything else None
    window = attr.get("window") if everything else None
    sinks = _optional(e, equation, 11) if everything else None
    if sinks is not None:
        heads = shape_of(operand(equation, 0))[-2]
        assert isinstance(heads, int)
        sinks = ops.reshape(sinks, axes(1, heads, 1, 1), False).output(0)
    inputs = [
        q, k, v,
        e.node(equation.args[3]), e.node(equation.args[4]),  # caches
        *(e.node(equation.args[index]) for index in (5, 6, 7, 8)),  # past_lens, seq_begins, block_ids, block_begins
        e.scalar(_number(attr["scale"])),
        scalar(int(_number(window or 0))),
        ops.constant(np.array(slopes, np.float32)).output(0) if slopes is not None else empty(np.float32),
        e.node(equation.args[9]),  # max_context
        empty(np.int32),  # score_aggregation_window
        empty(np.int32), empty(np.int32), empty(np.float32),  # rotation of cached blocks: indices, deltas, table
        empty(np.float32), scalar(0), scalar(0),  # sparse attention: threshold, block size, stride
        empty(np.float32) if sinks is None else sinks,
        scalar(0), empty(np.int32), empty(np.int32), empty(np.int32),  # eviction: start, sizes, block sets, begins
        empty(np.int32),  # token types
        empty(np.uint8), empty(np.int32),  # bias between queries and its begins
    ]  # fmt: skip
    node = PagedAttentionExtension(inputs)
    e.name(node, e.label(equation))
    return node.output(0)


def _joined(equation: Equation, index: int) -> tuple[int, ...]:
    heads, dim = shape_of(operand(equation, index))[-2:]
    assert isinstance(heads, int)
    assert isinstance(dim, int)
    return (heads * dim,)


def _number(value: object) -> float:
    assert isinstance(value, (int, float))
    return value


# -- as equations: what both forms without the native operation share -----------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Queries and keys with where they are: all of rank 2, [1 or B, S] and [1 or B, P]."""

    query_at: ov.Output
    key_at: ov.Output
    same: ov.Output | None  # [.., S, P]: whether query and key are of one sequence; None where all are
    prefix: ov.Output | None  # [1 or B, S or 1]: the length of each query's prefix


def _mask(e: Emitter, equation: Equation, layout: _Layout) -> ov.Output:
    """Which keys each query sees, bool [B,S,P]; made once for all layers that agree on it."""
    attr = equation.attr
    key = ("mask", attr["causal"], attr.get("window"), identity(layout.query_at), identity(layout.key_at))

    def make() -> ov.Output:
        at, keys = ops.unsqueeze(layout.query_at, axes(-1)), ops.unsqueeze(layout.key_at, axes(-2))
        mask = ops.greater_equal(keys, e.scalar(0, "i32"))
        if attr["causal"]:
            seen = ops.less_equal(keys, at)
            if layout.prefix is not None:
                seen = ops.logical_or(seen, ops.less(keys, ops.unsqueeze(layout.prefix, axes(-1))))
            mask = ops.logical_and(mask, seen)
        if attr.get("window") is not None:
            near = ops.less(ops.subtract(at, keys), e.scalar(int(_number(attr["window"])), "i32"))
            mask = ops.logical_and(mask, near)
        if layout.same is not None:
            mask = ops.logical_and(mask, layout.same)
        return mask.output(0)

    return e.memo(key if layout.prefix is None else (*key, identity(layout.prefix)), make)


def _attend(
    e: Emitter, equation: Equation, q: ov.Output, k: ov.Output, v: ov.Output, layout: _Layout, sinks: ov.Output | None
) -> ov.Output:
    """q[B,K,G,S,D] over k[B,K,1,P,D] and v[B,K,1,P,E] -> [B,K,G,S,E]."""
    attr = equation.attr
    heads, groups = shape_of(operand(equation, 0))[-2], shape_of(operand(equation, 1))[-2]
    assert isinstance(heads, int)
    assert isinstance(groups, int)
    scores = ops.multiply(ops.matmul(q, k, False, True), e.scalar(_number(attr["scale"])))
    if attr.get("softcap") is not None:
        cap = e.scalar(_number(attr["softcap"]))
        scores = ops.multiply(ops.tanh(ops.divide(scores, cap)), cap)
    slopes = attr.get("slopes")
    if slopes is not None:
        table = np.array(slopes, np.float32).reshape(1, groups, heads // groups, 1, 1)
        keys = e.memo(
            ("key_at", *identity(layout.key_at)),
            lambda: ops.convert(ops.unsqueeze(layout.key_at, axes(1, 2, 3)), "f32").output(0),
        )
        scores = ops.add(scores, _bias(e, table, keys, attr.get("bf16_bias")))
    mask = _mask(e, equation, layout)
    mask5 = e.memo(("mask5", *identity(mask)), lambda: ops.unsqueeze(mask, axes(1, 2)).output(0))
    scores = ops.select(mask5, scores, e.scalar(MASKED))
    if sinks is None:
        return ops.matmul(ops.softmax(scores, -1), v, False, False).output(0)
    column = ops.reshape(sinks, axes(1, groups, heads // groups, 1, 1), False)
    return ops.matmul(softmax_with(scores, column.output(0)), v, False, False).output(0)


def _bias(e: Emitter, slopes: np.ndarray, keys: ov.Output, bf16: object) -> ov.Output:
    """slope * position; with a factor `bf16` both and their product are rounded to bfloat16, then times the factor."""
    if bf16 is None:
        return ops.multiply(ops.constant(slopes), keys).output(0)
    rounded = e.memo(("bf16", *identity(keys)), lambda: _rounded(keys))
    table = torch.from_numpy(slopes).bfloat16().float().numpy()
    product = _rounded(ops.multiply(ops.constant(table), rounded).output(0))
    return ops.multiply(product, e.scalar(_number(bf16))).output(0)


_UNITS = (np.float32(2.0) ** np.arange(-64, 64)).astype(np.float32)


def _rounded(x: ov.Output) -> ov.Output:
    """Positive numbers rounded to the 8 bits of bfloat16, ties to even.

    Not by `convert`: the plugin holds bfloat16 in float32 and drops it. At a power of two, where the logarithm may fall
    on either side, both units give the same.
    """
    octave = ops.floor(ops.multiply(ops.log(ops.maximum(x, np.float32(2.0**-40))), np.float32(1.0 / np.log(2.0))))
    unit = ops.gather(ops.constant(_UNITS), ops.convert(ops.add(octave, np.float32(64 - 7)), "i32"), np.int64(0))
    return ops.multiply(ops.round(ops.divide(x, unit), "half_to_even"), unit).output(0)


def _optional(e: Emitter, equation: Equation, index: int) -> ov.Output | None:
    arg = equation.args[index] if len(equation.args) > index else None
    return None if arg is None else e.node(arg)


@emits("attention")
def attention(e: Emitter, equation: Equation) -> ov.Output:
    shapes = [shape_of(operand(equation, index)) for index in range(3)]
    (batch, length, heads, dim), (_, _, groups, _), (*_, wide) = shapes
    assert isinstance(heads, int)
    assert isinstance(groups, int)
    at = e.node(equation.args[3])
    prefix = _optional(e, equation, 4)
    column = None if prefix is None else e.memo(
        ("prefix", *identity(prefix)), lambda: ops.unsqueeze(prefix, axes(-1)).output(0)
    )  # fmt: skip
    layout, sinks = _Layout(at, at, None, column), _optional(e, equation, 5)
    plain = all(equation.attr.get(name) is None for name in ("softcap", "slopes"))
    if heads == groups and plain and sinks is None:
        return _fused(e, equation, layout)
    q5 = reshaped(e.node(equation.args[0]), shapes[0], (batch, length, groups, heads // groups, dim))
    q = ops.transpose(q5, axes(0, 2, 3, 1, 4)).output(0)
    k, v = (
        ops.unsqueeze(ops.transpose(e.node(arg), axes(0, 2, 1, 3)), axes(2)).output(0) for arg in equation.args[1:3]
    )
    out = _attend(e, equation, q, k, v, layout, sinks)
    back = ops.transpose(out, axes(0, 3, 1, 2, 4)).output(0)
    return reshaped(back, (batch, length, groups, heads // groups, wide), (batch, length, heads, wide))


def _fused(e: Emitter, equation: Equation, layout: _Layout) -> ov.Output:
    """As the opset's attention, which the plugin runs in one piece: a key head for each query head, a mask, no more."""
    mask = _mask(e, equation, layout)

    def term() -> ov.Output:
        return ops.unsqueeze(ops.select(mask, e.scalar(0.0), e.scalar(MASK_TERM)), axes(1)).output(0)

    q, k, v = (ops.transpose(e.node(arg), axes(0, 2, 1, 3)) for arg in equation.args[:3])
    added, scale = e.memo(("mask_term", *identity(mask)), term), e.scalar(_number(equation.attr["scale"]))
    out = ops.scaled_dot_product_attention(q, k, v, added, scale, causal=False)
    return ops.transpose(out, axes(0, 2, 1, 3)).output(0)


def _gathered(e: Emitter, equation: Equation) -> ov.Output:
    """Every query against every cached slot of the call and every new key; the mask keeps sequences apart.

    Costs T * (P * W + T) scores for each head where T * context / B would do: for features that are rare.
    """
    groups, block = shape_of(operand(equation, 3))[1:3]
    (heads, dim), wide = shape_of(operand(equation, 0))[-2:], shape_of(operand(equation, 2))[-1]
    coded = equation.attr.get("codes") is not None
    sizes = [groups, block, dim, heads, wide]
    assert all(isinstance(size, int) for size in sizes)
    groups, block, dim, heads, wide = (int(size) for size in sizes)
    layout = _paged_layout(e, equation, block)
    past_ok = e.memo(  # whatever an unwritten slot holds, NaN too, must not reach the sum
        ("past_ok", *identity(layout.key_at)),
        lambda: ops.unsqueeze(ops.greater_equal(layout.key_at, e.scalar(0, "i32")), axes(1, 2, 4)).output(0),
    )

    def joined(new: int, cache: int, size: int) -> ov.Output:
        blocks = ops.gather(e.node(equation.args[cache]), e.node(equation.args[7]), np.int64(0)).output(0)
        blocks = cache_rows.from_rows(e, blocks) if coded else ops.convert(blocks, "f32").output(0)
        old = ops.reshape(ops.transpose(blocks, axes(1, 0, 2, 3)), axes(1, groups, 1, -1, size), False)
        flat = ops.reshape(e.node(equation.args[new]), axes(-1, groups, size), False).output(0)
        flat = cache_rows.rounded(e, flat) if coded else flat
        fresh = ops.unsqueeze(ops.transpose(flat, axes(1, 0, 2)), axes(0, 2))
        return ops.select(past_ok, ops.concat([old, fresh], 3), e.scalar(0.0)).output(0)

    flat = ops.reshape(e.node(equation.args[0]), axes(-1, groups, heads // groups, dim), False)
    q = ops.unsqueeze(ops.transpose(flat, axes(1, 2, 0, 3)), axes(0)).output(0)
    sinks = _optional(e, equation, 11)
    out = _attend(e, equation, q, joined(1, 3, dim), joined(2, 4, wide), layout, sinks)
    back = ops.transpose(out, axes(0, 3, 1, 2, 4)).output(0)
    return reshaped(back, (), (*_rows(equation), heads, wide))


def _paged_layout(e: Emitter, equation: Equation, block: int) -> _Layout:
    """Where packed tokens and gathered slots are: once for all layers."""
    past, begins, ids, block_begins = (e.node(equation.args[index]) for index in (5, 6, 7, 8))
    prefix = _optional(e, equation, 10)
    q = ops.reshape(e.node(equation.args[0]), axes(-1, _joined(equation, 0)[0]), False).output(0)

    def count(of: ov.Output) -> ov.Output:
        length = ops.gather(ops.shape_of(of, "i32"), axes(0), np.int64(0))
        return ops.range(np.int32(0), ops.squeeze(length, axes(0)), np.int32(1), "i32").output(0)

    def owner(index: ov.Output, starts: ov.Output) -> ov.Output:
        """The sequence that each index belongs to: the number of sequences that end at or before it."""
        ends = ops.slice(starts, axes(1), axes(2**31 - 1), axes(1), axes(0))
        passed = ops.greater_equal(ops.unsqueeze(index, axes(1)), ops.unsqueeze(ends, axes(0)))
        return ops.reduce_sum(ops.convert(passed, "i32"), axes(1), keep_dims=False).output(0)

    def pick(table: ov.Output, index: ov.Output) -> ov.Output:
        return ops.gather(table, index, np.int64(0)).output(0)

    def token_owner() -> ov.Output:
        return owner(count(q), begins)

    key = ("paged", identity(past), identity(begins), identity(ids))
    of_token = e.memo((*key, "owner"), token_owner)

    def query_at() -> ov.Output:
        at = ops.add(pick(past, of_token), ops.subtract(count(q), pick(begins, of_token)))
        return ops.unsqueeze(at, axes(0)).output(0)

    at = e.memo((*key, "query_at"), query_at)

    def slots() -> tuple[ov.Output, ov.Output]:
        number = count(ids)
        of_block = owner(number, block_begins)
        first = ops.multiply(ops.subtract(number, pick(block_begins, of_block)), np.int32(block))
        place = ops.add(ops.unsqueeze(first, axes(1)), np.arange(block, dtype=np.int32)[None])
        written = ops.less(place, ops.unsqueeze(pick(past, of_block), axes(1)))
        flat = ops.reshape(ops.select(written, place, np.int32(-1)), axes(1, -1), False)
        spread = ops.broadcast(ops.unsqueeze(of_block, axes(1)), ops.shape_of(place, "i64"))
        return flat.output(0), ops.reshape(spread, axes(-1), False).output(0)

    def keys() -> ov.Output:
        return ops.concat([slots()[0], at], 1).output(0)

    def same() -> ov.Output:
        of_key = ops.concat([slots()[1], of_token], 0)
        equal = ops.equal(ops.unsqueeze(of_token, axes(1)), ops.unsqueeze(of_key, axes(0)))
        return ops.unsqueeze(equal, axes(0)).output(0)

    def prefixes() -> ov.Output:
        assert prefix is not None
        return ops.unsqueeze(pick(prefix, of_token), axes(0)).output(0)

    return _Layout(
        at,
        e.memo((*key, "key_at"), keys),
        e.memo((*key, "same"), same),
        None if prefix is None else e.memo((*key, "prefix"), prefixes),
    )
