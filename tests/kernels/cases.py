"""Batches for the attention kernels, with what the operation's own body gives; shared with bench/gpu_kernels.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from compiler.ir.cache_rows import HEAD, to_rows
from compiler.ir.core import Graph
from compiler.ir.interpreter import torch_dtype
from compiler.ir.ops.attention import paged_attention, rotate
from compiler.ir.parser import parse
from compiler.kernels import attention as lib

BLOCK, BLOCKS = 16, 24
FEATURES = ("window", "softcap", "slopes", "prefix", "sinks")


class Case:
    """A batch of sequences: (past, new) each; those with one new token come first, as the scheduler orders them."""

    def __init__(self, a: lib.Attention, sequences: list[tuple[int, int]]) -> None:
        self.a, self.generator = a, torch.Generator().manual_seed(7)
        kind = torch_dtype(a.dtype)
        self.sequences = sequences
        self.tokens = sum(new for _, new in sequences)
        width = a.heads * a.dim + a.groups * (a.dim + a.wide)
        self.row = self.random(self.tokens, width).to(kind)
        parts = self.row.split((a.heads * a.dim, a.groups * a.dim, a.groups * a.wide), 1)
        self.q, self.k, self.v = parts
        self.k_cache, self.v_cache = self.cache(a.dim), self.cache(a.wide)
        order = torch.randperm(BLOCKS, generator=self.generator).tolist()
        ids: list[int] = []
        begins, block_begins, slots, positions = [0], [0], [], []
        for past, new in sequences:
            own = [order.pop() for _ in range(-(-(past + new) // BLOCK))]
            for at in range(past):
                self.k_cache[own[at // BLOCK], :, at % BLOCK] = self.kept(self.random(a.groups, a.dim))
                self.v_cache[own[at // BLOCK], :, at % BLOCK] = self.kept(self.random(a.groups, a.wide))
            slots += [own[at // BLOCK] * BLOCK + at % BLOCK for at in range(past, past + new)]
            positions += range(past, past + new)
            ids += own
            begins.append(begins[-1] + new)
            block_begins.append(len(ids))
        angles = torch.rand(self.tokens, max(a.pairs, 1), generator=self.generator) * 6
        self.values: dict[str, Any] = {
            "past_lens": integers(past for past, _ in sequences), "seq_begins": integers(begins),
            "block_ids": integers(ids), "block_begins": integers(block_begins), "slots": integers(slots),
            "cos": angles.cos(), "sin": angles.sin(),
            "prefix": integers(past + 5 for past, _ in sequences),
            "sinks": self.random(a.heads).to(kind),
            "slopes": torch.tensor([2.0 ** -(head + 1) for head in range(a.heads)]),
        }  # fmt: skip

    def cache(self, size: int) -> torch.Tensor:
        """A cache that nobody wrote: nothing may read it, its numbers are NaN, and so are scales of bytes of 255."""
        shape, kind = (BLOCKS, self.a.groups, BLOCK), torch_dtype(self.a.cache_dtype)
        if self.a.codes is None:
            return torch.full((*shape, size), torch.nan, dtype=kind)
        return torch.full((*shape, size + HEAD), 255, dtype=kind)

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers as the cache has them."""
        kind = torch_dtype(self.a.cache_dtype)
        return x.to(kind) if self.a.codes is None else to_rows(x.to(torch_dtype(self.a.dtype)), self.a.codes)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator) * 1.5

    def expected(self) -> torch.Tensor:
        """The operation's own body; changes its own copies of the caches, which stay as `wanted`."""
        a, values = self.a, self.values
        q = self.q.reshape(-1, a.heads, a.dim)
        k, v = self.k.reshape(-1, a.groups, a.dim), self.v.reshape(-1, a.groups, a.wide)
        if a.pairs:
            q, k = (rotate(x, values["cos"], values["sin"], style=a.style) for x in (q, k))
        self.wanted = self.k_cache.clone(), self.v_cache.clone()
        slopes = tuple(values["slopes"].tolist()) if a.slopes else None
        return paged_attention(
            q, k, v, *self.wanted, values["past_lens"], values["seq_begins"], values["block_ids"],
            values["block_begins"], None, values["prefix"] if a.prefix else None, values["sinks"] if a.sinks else None,
            scale=a.scale, causal=a.causal, window=a.window, softcap=a.softcap, slopes=slopes, bf16_bias=a.bf16_bias,
            codes=a.codes,
        )  # fmt: skip

    def launches(
        self, splits: int, architecture: int = 80
    ) -> tuple[list[tuple[lib.Launch, tuple[int, int, int]]], dict[str, Any]]:
        """Kernels and their grids, and every value: decode of single tokens, append and prefill of the rest."""
        a = self.a
        row = self.row.clone()
        q, k, v = row.split((a.heads * a.dim, a.groups * a.dim, a.groups * a.wide), 1)
        out = torch.full((self.tokens, a.heads, a.wide), torch.nan, dtype=row.dtype)
        values = self.values | {"q": q, "k": k, "v": v, "k_cache": self.k_cache, "v_cache": self.v_cache, "out": out}
        found = []
        single = 0
        while single < len(self.sequences) and self.sequences[single][1] == 1:
            single += 1
        decode = lib.decode(a, splits)
        values["first"] = single if decode.constants["new"] else 0
        if values["first"] < self.tokens:
            append = lib.append(a)
            tile = append.constants["tile"]
            heads = (-(-a.heads // tile) if a.pairs else 0) + -(-a.groups // tile)
            found.append((append, (self.tokens - values["first"], heads, 1)))
        if single:
            if splits > 1:
                decode = replace(decode, constants=decode.constants | {"tile": 16})  # short sequences have several
                values["parts"] = torch.full((single, a.heads, splits, a.wide), torch.nan)
                values["tops"] = torch.full((2, single, a.heads, splits), torch.nan)
                values["ended"] = torch.zeros((single, a.groups), dtype=torch.int32)
            found.append((decode, (single, a.groups, splits)))
        tile = lib.query_tile(a)
        tiles = [
            (row, start)
            for row, (_, new) in enumerate(self.sequences)
            if row >= single
            for start in range(0, new, tile)
        ]
        if tiles:
            values["tile_rows"] = integers([*(row for row, _ in tiles), -1])
            values["tile_starts"] = integers([*(start for _, start in tiles), 0])
            values["tiles"] = len(tiles) + 1
            (launch,) = (one for one in lib.launches(a, architecture) if one.name == "prefill")
            shared = "tiles" in dict(launch.arguments)  # by a few programs, each with several turns
            found.append((launch, (5, 1, 1) if shared else (a.heads, len(tiles) + 1, 1)))
        return found, values


def integers(values: Any) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def attention(features: tuple[str, ...] = (), **changes: Any) -> lib.Attention:
    options: dict[str, Any] = {
        "dtype": "f32", "heads": 4, "groups": 2, "dim": 32, "block": BLOCK, "causal": True, "pairs": 16,
        "window": 9 if "window" in features else None, "softcap": 2.0 if "softcap" in features else None,
        **{name: name in features for name in ("slopes", "prefix", "sinks")}, **changes,
    }  # fmt: skip
    options.setdefault("wide", options["dim"])
    options.setdefault("cache_dtype", "u8" if options.get("codes") else options["dtype"])
    heads, groups, dim, wide = (options[name] for name in ("heads", "groups", "dim", "wide"))
    width = heads * dim + groups * (dim + wide)
    return lib.Attention(scale=dim**-0.5, q=(0, width, dim), k=(heads * dim, width, dim),
                         v=((heads + groups) * dim, width, wide), **options)  # fmt: skip


SEQUENCES = [(0, 1), (40, 1), (0, 33), (30, 5)]


# How inputs are rounded, as the pass `quantize` writes it: 96 numbers a row.
ROUNDING = {
    "nvfp4": ("""%most: f32[T,6] = row_scale(%x) {dtype = "f4e2m1", block = 16}
  %more: f32[T,6] = maximum(%most, %least)
  %s: f8e4m3[T,6] = quantize(%more, %outer) {dtype = "f8e4m3"}
  %q: f4e2m1[T,96] = quantize(%x, %s, _, %outer) {dtype = "f4e2m1", block = (1, 16)}
  %y: f16[T,96] = dequantize(%q, %s, _, %outer) {dtype = "f16", block = (1, 16)}"""),
    "mxfp8": ("""%s: f8e8m0[T,3] = row_scale(%x) {dtype = "f8e4m3", block = 32, scale = "f8e8m0"}
  %q: f8e4m3[T,96] = quantize(%x, %s) {dtype = "f8e4m3", block = (1, 32)}
  %y: f16[T,96] = dequantize(%q, %s) {dtype = "f16", block = (1, 32)}"""),
    "mxfp4": ("""%s: f8e8m0[T,3] = row_scale(%x) {dtype = "f4e2m1", block = 32, scale = "f8e8m0"}
  %q: f4e2m1[T,96] = quantize(%x, %s) {dtype = "f4e2m1", block = (1, 32)}
  %y: f16[T,96] = dequantize(%q, %s) {dtype = "f16", block = (1, 32)}"""),
    "w4a8": ("""%s: f32[T,3] = row_scale(%x) {dtype = "i8", block = 32}
  %q: i8[T,96] = quantize(%x, %s) {dtype = "i8", block = (1, 32)}
  %y: f16[T,96] = dequantize(%q, %s) {dtype = "f16", block = (1, 32)}"""),
    "fp8": ("""%q: f8e4m3[T,96] = quantize(%x, %outer) {dtype = "f8e4m3"}
  %y: f16[T,96] = dequantize(%q, %outer) {dtype = "f16"}"""),
}  # fmt: skip


def rounding(name: str) -> Graph:
    """A segment that rounds its input and widens it again."""
    return parse(f"""graph segment(%x: f16[T,96], %outer: f32[1], %least: f32[1]) {{
  dim T in 1..8..64
  {ROUNDING[name]}
  return y = %y
}}
""")
