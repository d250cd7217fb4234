"""Small graphs to rewrite: built from a spec as the compiler builds them, then run by the interpreter."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compiler.frontend import Built, Limits, build
from compiler.ir import Equation, Graph, Value, walk
from compiler.ir.core import substitute
from compiler.ir.interpreter import run, torch_dtype
from compiler.ir.names import expand, is_template
from compiler.ir.parser import parse
from compiler.ir.printer import print_graph
from compiler.passes.runner import Log, Pass
from specs.schema import load_spec

ROPE = "{kind: rope, style: half, dims: d_head, theta: 10000.0}"
CONFIG: dict[str, Any] = {
    "d_model": 16, "layers": 2, "heads": 4, "kv_heads": 2, "d_head": 8, "d_ffn": 24, "vocab": 32,
}  # fmt: skip
SPEC = """\
schema: 1
name: model
match: {{model_type: model}}
source: {{paper: none, code: none}}
config:
  d_model: d_model
  layers: layers
  heads: heads
  kv_heads: kv_heads
  d_head: d_head
  d_ffn: d_ffn
  vocab: vocab
parts:
  embed: {{kind: embedding, rows: vocab}}
  norm_1: {norm}
  attn: {{kind: attention, {attention}}}
  norm_2: {norm}
  mlp: {mlp}
  norm_f: {norm}
  head: {{kind: linear, out: vocab}}
graph:
  - x = embed(tokens)
  - repeat layers:
      - x = x + attn(norm_1(x))
      - x = x + mlp(norm_2(x))
  - {output}
checkpoint:
  embed: embed
  norm_1: "layers.{{i}}.norm_1"
  attn.q: "layers.{{i}}.q"
  attn.k: "layers.{{i}}.k"
  attn.v: "layers.{{i}}.v"
  attn.o: "layers.{{i}}.o"
{leaves}
  norm_f: norm_f
  head: head
"""
EXPERTS = (
    "{kind: moe, experts: 6, top_k: 2, expert: {kind: gated, act: silu}, router: {score: sigmoid, correction: true, "
    "groups: 3, top_groups: 2, group_best: 2, renormalise: true, scale: 2.5}}"
)


def model(
    *,
    attention: str = f"mask: causal, position: {ROPE}",
    norm: str = "{kind: rms_norm, eps: 1.0e-5}",
    mlp: str = "{kind: gated_mlp, act: silu}",
    output: str = "logits = head(norm_f(x))",
    limits: Limits | None = None,
    **config: Any,
) -> Built:
    """A two-layer decoder; keywords replace one part each, or numbers of its configuration."""
    names = ["mlp.up", "mlp.down", "norm_2"] + (["mlp.gate"] if "gated" in mlp else [])
    names += ["attn.q_norm", "attn.k_norm"] if "qk_norm" in attention else []
    leaves = "\n".join(f'  {name}: "layers.{{i}}.{name}"' for name in names)
    text = SPEC.format(attention=attention, norm=norm, mlp=mlp, output=output, leaves=leaves)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.yaml"
        path.write_text(text, encoding="utf-8")
        return build(load_spec(path), {**CONFIG, **config}, limits or Limits(4, 64))


def text_of(graph: Graph) -> str:
    """The graph as text, without the places in a temporary file."""
    return print_graph(graph, places=False)


def unrolled(graph: Graph) -> Graph:
    """The same graph with every round of `repeat` written out."""
    equations: list[Equation] = []
    mapping: dict[str, Any] = {}
    for equation in graph.equations:
        if equation.body is None:
            equations.append(substitute(equation, mapping))
            continue
        count = equation.attr["count"]
        assert isinstance(count, int)
        carried: list[Any] = [mapping.get(value.name, value) for value in equation.values]
        for index in range(count):
            inner = dict(mapping)
            inner.update(zip((value.name for value in equation.body.params), carried, strict=True))
            for old in equation.body.equations:
                new = substitute(old, inner)
                results = tuple(Value(f"{value.name}.r{index}", value.type) for value in new.results)
                attrs = tuple(
                    (key, expand(value, index) if key == "name" and isinstance(value, str) else value)
                    for key, value in new.attrs
                )
                equations.append(Equation(new.op, new.args, results, attrs, None, new.where))
                inner.update(zip((value.name for value in old.results), results, strict=True))
            carried = [inner[value.name] for value in equation.body.results]
        mapping.update(zip((value.name for value in equation.results), carried, strict=True))
    outputs = tuple((name, mapping.get(value.name, value)) for name, value in graph.outputs)
    return Graph(graph.name, graph.dims, graph.inputs, tuple(equations), outputs)


@dataclass
class Weights:
    """Random weights by name, the same for every run of a test."""

    graph: Graph
    seed: int = 0

    def __post_init__(self) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        for top in self.graph.equations:
            rounds = top.attr.get("count", 1)
            assert isinstance(rounds, int)
            for equation in walk((top,)):
                if equation.op == "weight":
                    name = str(equation.attr["name"])
                    for index in range(rounds if is_template(name) else 1):
                        shapes[expand(name, index)] = equation.result.type.static_shape()
        generator = torch.Generator().manual_seed(self.seed)
        self.tensors = {
            name: torch.randn(shapes[name], generator=generator) * (0.3 if len(shapes[name]) > 1 else 1.0)
            for name in sorted(shapes)
        }

    def __call__(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def batch(lengths: tuple[int, ...], vocab: int = 32, seed: int = 1) -> dict[str, torch.Tensor]:
    """Padded inputs of sequences with these lengths; a prefix of 2 where a graph takes one."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    tokens = torch.randint(0, vocab, shape, generator=generator, dtype=torch.int32)
    positions = torch.arange(shape[1], dtype=torch.int32).repeat(shape[0], 1)
    for row, length in enumerate(lengths):
        positions[row, length:] = -1
    return {"tokens": tokens, "positions": positions, "prefix": torch.full((shape[0],), 2, dtype=torch.int32)}


def outputs(graph: Graph, weights: Weights, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a graph on those of `inputs` that it has."""
    return run(graph, {value.name: inputs[value.name] for value in graph.inputs}, weights)


def masked(logits: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The rows of [B,S,V] that are no padding."""
    return logits[inputs["positions"] >= 0]


def drive(graph: Graph, weights: Weights, rows: int = 3, length: int = 6) -> dict[str, torch.Tensor]:
    """Run a graph in any form, before or after the cache, packed or not, on `rows` sequences of one length.

    Outputs are flattened to [rows * length, ...], so that all forms give the same.
    """
    inputs = batch((length,) * rows)
    blocks = list(range(rows))[::-1]
    known: dict[str, torch.Tensor | list[int] | int] = {
        **inputs, "past_lens": [0] * rows, "seq_begins": [length * row for row in range(rows + 1)], "block_ids": blocks,
        "block_begins": list(range(rows + 1)), "max_context": length, "select": list(range(rows * length)),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    feed = {}
    for value in graph.inputs:
        if value.name in known:
            tensor = torch.as_tensor(known[value.name], dtype=torch.int32)
            feed[value.name] = tensor.flatten() if value.type.rank == 1 else tensor
            continue
        sizes = [{"B": rows, "S": length}.get(str(dim), dim) for dim in value.type.shape]
        feed[value.name] = torch.randn([int(size) for size in sizes], generator=generator)
    states = paged_states(graph, rows)
    return {name: tensor.reshape(rows * length, -1) for name, tensor in run(graph, feed, weights, states).items()}


def paged_states(graph: Graph, blocks: int) -> dict[str, torch.Tensor]:
    """Every cache of a graph, full of garbage: nothing may read what was not written."""
    states = {}
    for top in graph.equations:
        rounds = top.attr.get("count", 1)
        assert isinstance(rounds, int)
        for equation in walk((top,)):
            if equation.op == "state":
                name, kind = str(equation.attr["name"]), equation.result.type
                shape = [blocks if isinstance(dim, str) else dim for dim in kind.shape]  # of a linear cache: rows
                for index in range(rounds if is_template(name) else 1):
                    states[expand(name, index)] = torch.full(shape, 7.0, dtype=torch_dtype(kind.dtype))
    return states


@dataclass
class Paged:
    """Serves a packed graph to several sequences with a paged cache, as a runtime does; checks nothing itself."""

    graph: Graph
    weights: Weights
    blocks: int = 24
    size: int = 32

    def __post_init__(self) -> None:
        self.states = paged_states(self.graph, self.blocks)
        # not in order, so that a wrong block is seen
        self.free = [(7 * index + 3) % self.blocks for index in range(self.blocks)]
        self.owned: dict[int, list[int]] = {}
        self.past: dict[int, int] = {}

    def step(self, new: dict[int, list[int]], prefix: int = 2, wanted: str = "all") -> dict[int, torch.Tensor]:
        """Append tokens to sequences; gives each one's logits, of all new tokens or of the last."""
        tokens, positions, select, begins, blocks, block_begins, past = [], [], [], [0], [], [0], []
        for key, ids in new.items():
            start = self.past.get(key, 0)
            past.append(start)
            owned = self.owned.setdefault(key, [])
            while len(owned) * self.size < start + len(ids):
                owned.append(self.free.pop(0))
            first = len(tokens) if wanted == "all" else len(tokens) + len(ids) - 1
            tokens += ids
            select += range(first, len(tokens))
            positions += range(start, start + len(ids))
            begins.append(len(tokens))
            blocks += owned
            block_begins.append(len(blocks))
            self.past[key] = start + len(ids)
        longest = max(self.past[key] for key in new)
        data = {
            "tokens": tokens, "positions": positions, "past_lens": past, "seq_begins": begins, "block_ids": blocks,
            "block_begins": block_begins, "max_context": longest, "select": select, "prefix": [prefix] * len(new),
        }  # fmt: skip
        inputs = {value.name: torch.tensor(data[value.name], dtype=torch.int32) for value in self.graph.inputs}
        logits = run(self.graph, inputs, self.weights, self.states)["logits"]
        out, at = {}, 0
        for key, ids in new.items():
            rows = len(ids) if wanted == "all" else 1
            out[key] = logits[at : at + rows]
            at += rows
        return out


# -- graphs as text ---------------------------------------------------------------------------------------------------

LOWEST = "-3.4028234663852886e+38"  # what a masked score becomes


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
