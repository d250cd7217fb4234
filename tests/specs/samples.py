"""A small architecture, and checkpoints written byte by byte, to break in one place each."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specs.errors import Where
from specs.schema import Spec, load_spec
from specs.weight_map import WeightDecl

SPEC = """\
schema: 1
name: small
match: {model_type: small}
source: {paper: none}
config:
  d_model:  hidden_size
  layers:   num_layers
  heads:    num_heads
  kv_heads: num_kv_heads | heads
  d_head:   head_dim | d_model / heads
  d_ffn:    ffn
  vocab:    vocab_size
  theta:    rope_theta | 10000.0
  tied:     tie | false
require: {act: silu}
ignore: {config: [hint], tensors: ["layers.{i}.unused"]}
parts:
  embed:  {kind: embedding, rows: vocab}
  norm_1: {kind: rms_norm, eps: 1.0e-5}
  attn:
    kind: attention
    mask: causal
    position: {kind: rope, style: half, dims: d_head, theta: theta}
  mlp:    {kind: gated_mlp, act: silu}
  norm_f: {kind: rms_norm, eps: 1.0e-5}
  head:   {kind: linear, out: vocab, tied: {to: embed, when: tied}}
graph:
  - x = embed(tokens)
  - repeat layers:
      - h = norm_1(x)
      - x = x + attn(h) + mlp(h)
  - logits = head(norm_f(x))
checkpoint:
  embed:    embed
  norm_1:   layers.{i}.norm
  attn.qkv: {from: "layers.{i}.qkv", layout: "[q: heads, k: kv_heads, v: kv_heads] d_head"}
  attn.o:   layers.{i}.o
  mlp.gate: layers.{i}.gate
  mlp.up:   layers.{i}.up
  mlp.down: layers.{i}.down
  norm_f:   norm
  head:     head
sizes:
  1b: {d_model: 8, layers: 2, heads: 2, d_ffn: 6, vocab: 10, parameters: 1000}
"""

CONFIG: dict[str, Any] = {
    "model_type": "small",
    "hidden_size": 8,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn": 6,
    "vocab_size": 10,
}

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (10, 8),
    **{
        f"layers.{i}.{name}.weight": shape
        for i in range(2)
        for name, shape in (
            ("norm", (8,)),
            ("qkv", (16, 8)),
            ("o", (8, 8)),
            ("gate", (6, 8)),
            ("up", (6, 8)),
            ("down", (8, 6)),
        )
    },
    "norm.weight": (8,),
    "head.weight": (10, 8),
}
"""The tensors of a checkpoint of SPEC with CONFIG."""

_OURS: dict[str, tuple[int, ...]] = {
    "norm_1": (8,),
    "attn.q": (8, 8),
    "attn.k": (4, 8),
    "attn.v": (4, 8),
    "attn.o": (8, 8),
    "mlp.gate": (6, 8),
    "mlp.up": (6, 8),
    "mlp.down": (8, 6),
}


def write_spec(folder: Path, old: str = "", new: str = "", text: str = SPEC) -> Path:
    """The small architecture with one piece of text replaced."""
    assert old in text
    path = folder / "small.yaml"
    path.write_text(text.replace(old, new, 1) if old else text, encoding="utf-8")
    return path


def broken(folder: Path, old: str, new: str) -> Spec:
    """Load the architecture with one piece replaced."""
    return load_spec(write_spec(folder, old, new))


def needed(spec: Spec, tied: bool = False) -> list[WeightDecl]:
    """The weights that the small architecture needs."""

    def decl(leaf: str, layer: int | None, shape: tuple[int, ...]) -> WeightDecl:
        prefix = "" if layer is None else f"layers.{layer}."
        where = spec.parts[leaf.split(".")[0]].where
        return WeightDecl(f"{prefix}{leaf}.weight", leaf, "weight", layer, shape, where)

    found = [decl("embed", None, (10, 8)), decl("norm_f", None, (8,))]
    found += [decl(leaf, layer, shape) for layer in range(2) for leaf, shape in _OURS.items()]
    return found if tied else [*found, decl("head", None, (10, 8))]


def safetensors(shapes: Mapping[str, Sequence[int]], dtype: str = "F32") -> bytes:
    """A safetensors file whose tensors count up from 0."""
    import numpy

    numpy_types = {"F32": "<f4", "I64": "<i8"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, shape in shapes.items():
        values = numpy.arange(int(numpy.prod(shape)), dtype=numpy_types[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_checkpoint(
    folder: Path, shapes: Mapping[str, Sequence[int]] = SHAPES, config: Mapping[str, Any] = CONFIG, dtype: str = "F32"
) -> Path:
    """A checkpoint folder with one weight file."""
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(safetensors(shapes, dtype))
    return folder


HERE = Where("config.json")
