"""What one attention asks of the kernels, as data, and the launches that answer it: names, arguments, constants.

Everything but the batch is a compile-time constant, so that a kernel has no branch that its model does not need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SPLITS = (1, 2, 4, 8, 16, 32)  # how often decode may cut the keys; the runtime picks by batch and multiprocessors
LEAST_KEYS = 64  # of a split
HOPPER = 90  # the one architecture whose tensor cores read as wgmma does
APPENDS = 4  # splits from which on decode turns and appends by itself: up to a few hundred key heads in a batch
TILE_BYTES = 32768  # of a key tile: a few in flight fill an SM's share of the memory bus, and fit shared memory


@dataclass(frozen=True)
class Attention:
    """One paged attention; `q`, `k`, `v` are (offset, row, head) in elements of the value that each lies in.

    `pairs` is how many pairs of dims are rotated, 0 for none.
    """

    dtype: str
    cache_dtype: str
    heads: int
    groups: int
    dim: int
    wide: int
    block: int
    scale: float
    causal: bool
    q: tuple[int, int, int]
    k: tuple[int, int, int]
    v: tuple[int, int, int]
    pairs: int = 0
    style: str = "half"
    window: int | None = None
    softcap: float | None = None
    slopes: bool = False
    codes: str | None = None  # of an 8-bit cache: u8 or f8e4m3, its rows are bytes
    bf16_bias: float | None = None  # of slopes: the biases are computed in bfloat16, then times this
    prefix: bool = False
    sinks: bool = False


@dataclass(frozen=True)
class Launch:
    """A kernel with its constants: `arguments` are (name, type) of what is passed, in the order of the kernel."""

    name: str
    source: str  # module and function
    arguments: tuple[tuple[str, str], ...]
    constants: dict[str, Any]
    warps: int
    stages: int
    unaligned: tuple[str, ...] = ()  # pointers that may lie between vectors of 16 bytes
    text: str = ""  # the whole source, where it was written for one graph
    resident: int = 0  # blocks that a multiprocessor takes at most; 0: as many as it can


def power(size: int, least: int = 1) -> int:
    """The least power of two that holds `size`."""
    return max(least, 1 << (size - 1).bit_length())


def key_tile(attention: Attention, most: int) -> int:
    """Keys in a tile, at most `most` and TILE_BYTES: whole blocks of the cache or a part of one; products need 16."""
    row = power(max(attention.dim, attention.wide), 16) * (4 if attention.dtype == "f32" else 2)
    tile = 16
    while tile * 2 * row <= TILE_BYTES and tile < most and _fits(tile * 2, attention.block):
        tile *= 2
    return tile


def _fits(tile: int, block: int) -> bool:
    return block % tile == 0 or tile % block == 0


def query_tile(attention: Attention) -> int:
    """Tokens in a tile of prefill: what registers hold."""
    if attention.dtype == "f32":
        return 32
    return 128 if max(attention.dim, attention.wide) <= 128 else 64


def append(attention: Attention) -> Launch:
    """Rotary and append, of the tokens that no `decode` appends."""
    a = attention
    tile = max(1, min(power(a.heads), 2048 // power(max(a.dim, a.wide))))
    constants = _new(a) | {name: _constants(a)[name] for name in _SHARED} | {"tile": tile}
    arguments = (*_inputs(a), ("first", "int"))
    return Launch("append", "append.append", arguments, constants, 4, 2, _unaligned(a))


def prefill(attention: Attention) -> Launch:
    """Attention over the query tiles of the sequences with several new tokens."""
    rows = query_tile(attention)
    arguments = (
        ("q", attention.dtype), ("k_cache", attention.cache_dtype), ("v_cache", attention.cache_dtype),
        ("out", attention.dtype), *((name, "i32") for name in _METADATA), ("tile_rows", "i32"), ("tile_starts", "i32"),
        *_extras(attention),
    )  # fmt: skip
    constants = _constants(attention) | {"rows": rows, "tile": key_tile(attention, 64)}
    stages = 2 if attention.dtype == "f32" or max(attention.dim, attention.wide) > 128 else 3
    warps = 4 if attention.codes is None else 8  # making numbers of codes takes registers too: none are spilled then
    return Launch("prefill", "prefill.prefill", arguments, constants, warps, stages, _unaligned(attention))


def suits_hopper(attention: Attention) -> bool:
    """Whether compiler/kernels/prefill_hopper.py has it: 16-bit numbers, heads of 64 or 128, no biases or soft caps."""
    a = attention
    plain = a.cache_dtype == a.dtype != "f32" and a.softcap is None and not a.slopes
    vectors = "q" not in _unaligned(a) and a.q[1] % 8 == a.q[2] % 8 == 0  # of 16 bytes, which are copied at a time
    return plain and vectors and a.dim == a.wide and a.dim in (64, 128) and a.block % 16 == 0


def prefill_hopper(attention: Attention) -> Launch:
    """The same on sm_90, by programs that share the tiles out among them."""
    a = attention
    arguments = (
        ("q", a.dtype), ("k_cache", a.cache_dtype), ("v_cache", a.cache_dtype), ("out", a.dtype),
        *((name, "i32") for name in _METADATA), ("tile_rows", "i32"), ("tile_starts", "i32"), ("tiles", "int"),
        *_extras(a)[:2],
    )  # fmt: skip
    names = ("q_row", "q_head", "heads", "groups", "dim", "block", "scale", "causal", "window")
    near = 8 * a.heads // a.groups if a.groups % 8 == 0 else a.heads
    constants = {name: _constants(a)[name] for name in names} | {
        "rows": query_tile(a), "tile": 128, "stages": 2, "queries": 2, "registers": 208, "near": near, "order": True,
    }  # fmt: skip
    return Launch("prefill", "prefill_hopper.prefill", arguments, constants, 4, constants["stages"], _unaligned(a))


def decode(attention: Attention, splits: int) -> Launch:
    """Attention of one new token a sequence."""
    parts, new = "f32" if splits > 1 else "", splits >= APPENDS
    left = () if new else ("k", "v", "cos", "sin", "slots")
    arguments = (
        *((name, "" if name in left else kind) for name, kind in _inputs(attention)),
        ("out", attention.dtype), ("parts", parts), ("tops", parts), ("ended", "i32" if splits > 1 else ""),
        ("past_lens", "i32"), ("block_ids", "i32"), ("block_begins", "i32"), *_extras(attention),
    )  # fmt: skip
    share = attention.heads // attention.groups
    # one query head reads as fast as memory gives in tall tiles, where sequences are few in more of them; several make
    # products of them (docs/evidence/gpu)
    alone = share == 1 or attention.dtype == "f32"
    tile, stages = (64, 3) if not alone else (128, 2) if splits < 8 else (64, 2)
    constants = _constants(attention) | _new(attention) | {
        "splits": splits, "rows": power(share, 16), "tile": key_tile(attention, tile), "new": new,
    }  # fmt: skip
    return Launch(f"decode{splits}", "decode.decode", arguments, constants, 4, stages, _unaligned(attention))


def launches(attention: Attention, architecture: int) -> list[Launch]:
    """Every kernel that one attention may need on an architecture (90 is sm_90)."""
    tiled = prefill_hopper if architecture == HOPPER and suits_hopper(attention) else prefill
    return [append(attention), tiled(attention), *(decode(attention, splits) for splits in SPLITS)]


_SHARED = ("q_row", "q_head", "heads", "groups", "dim", "wide", "block", "codes", "dim_span", "wide_span")
_METADATA = ("past_lens", "seq_begins", "block_ids", "block_begins")


def _unaligned(attention: Attention) -> tuple[str, ...]:
    """Which of q, k, v do not start at a whole vector of 16 bytes in their value."""
    size = 4 if attention.dtype == "f32" else 2
    starts = (("q", attention.q), ("k", attention.k), ("v", attention.v))
    return tuple(name for name, (offset, _, _) in starts if offset * size % 16)


def _inputs(attention: Attention) -> tuple[tuple[str, str], ...]:
    """What new tokens are made of, and where they go."""
    a, angle = attention, "f32" if attention.pairs else ""
    return (
        ("q", a.dtype), ("k", a.dtype), ("v", a.dtype), ("cos", angle), ("sin", angle), ("slots", "i32"),
        ("k_cache", a.cache_dtype), ("v_cache", a.cache_dtype),
    )  # fmt: skip


def _new(attention: Attention) -> dict[str, Any]:
    """Constants of what turns and appends."""
    a = attention
    return {
        "k_row": a.k[1], "k_head": a.k[2], "v_row": a.v[1], "v_head": a.v[2], "pairs": a.pairs,
        "step": 1 if a.style == "half" else 2,
    }  # fmt: skip


def _extras(attention: Attention) -> tuple[tuple[str, str], ...]:
    return (
        ("prefix", "i32" if attention.prefix else ""),
        ("sinks", attention.dtype if attention.sinks else ""),
        ("slopes", "f32" if attention.slopes else ""),
    )


def _constants(attention: Attention) -> dict[str, Any]:
    a = attention
    return {
        "q_row": a.q[1], "q_head": a.q[2], "heads": a.heads, "groups": a.groups, "dim": a.dim, "wide": a.wide,
        "block": a.block, "scale": a.scale, "causal": a.causal, "window": a.window, "softcap": a.softcap,
        "bf16_bias": a.bf16_bias, "codes": a.codes,
        "dim_span": power(a.dim, 16), "wide_span": power(a.wide, 16),
    }  # fmt: skip
