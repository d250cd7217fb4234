"""Graphs of several ranks: exchanges are steps, segments are shared, tensors that are the same are stored once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from compiler.ir.core import Graph
from compiler.ir.parser import parse
from compiler.ir.verify import verify
from compiler.lower.ranks import check_alike, write_ranks
from compiler.lower.tensorrt.lowering import plan_of
from compiler.lower.tensorrt.options import asked_options

# A product split by outputs, one over the split axis, and logits that are gathered; half of each weight for each rank.
TEXT = """
graph g(%x: f16[T,64]) {{
  dim T in 1..128..512
  %norm.weight: f16[64] = weight() {{name = "w.norm"}}
  %up.whole: f16[128,64] = weight() {{name = "w.up"}}
  %up: f16[64,64] = slice(%up.whole) {{axis = -2, start = {start}, stop = {stop}}}
  %down.whole: f16[64,128] = weight() {{name = "w.down"}}
  %down: f16[64,64] = slice(%down.whole) {{axis = -1, start = {start}, stop = {stop}}}
  %head.whole: f16[128,64] = weight() {{name = "w.head"}}
  %head: f16[64,64] = slice(%head.whole) {{axis = -2, start = {start}, stop = {stop}}}
  %hidden: f16[T,64] = matmul(%x, %up) {{transpose_b = true}}
  %act: f16[T,64] = silu(%hidden)
  %part: f16[T,64] = matmul(%act, %down) {{transpose_b = true}}
  %sum: f16[T,64] = all_reduce(%part) {{ranks = 2}}
  %y: f16[T,64] = add(%x, %sum)
  %norm: f16[T,64] = rms_norm(%y, %norm.weight) {{eps = 0.00001}}
  %logits.part: f16[T,64] = matmul(%norm, %head) {{transpose_b = true}}
  %logits: f16[T,128] = all_gather(%logits.part) {{axis = -1, ranks = 2}}
  return logits = %logits
}}
"""
OPTIONS = asked_options({"toolchain": "tensorrt-8.6"}, 2)


def graph_of(rank: int) -> Graph:
    graph = parse(TEXT.format(start=64 * rank, stop=64 * rank + 64))
    verify(graph)
    return graph


def test_exchanges_are_steps() -> None:
    (_, one), (_, two) = (plan_of(graph_of(rank), OPTIONS, 90) for rank in range(2))
    check_alike([one, two])
    assert one.steps == two.steps
    assert [(step.kind, step.name) for step in one.steps if step.kind == "collective"] == [
        ("collective", "all_reduce"), ("collective", "all_gather"),
    ]  # fmt: skip
    at = [step.kind for step in one.steps].index("collective")
    step = one.steps[at]
    assert (step.backend, step.inputs, step.outputs) == ("nccl", {"x": "part"}, {"out": "sum"})
    assert "part" in one.steps[at - 1].outputs.values()
    assert "sum" in one.steps[at + 1].inputs.values()
    assert one.steps[-1].outputs == {"out": "logits"}
    assert {value.name: value.type.shape for value in one.values}["logits"] == ("T", 128)


def test_what_is_the_same_is_stored_once(tmp_path: Path) -> None:
    made = {f"w.{name}": torch.randn(128, 64).half() for name in ("up", "head")}
    made |= {"w.down": torch.randn(64, 128).half(), "w.norm": torch.randn(64).half()}
    pieces = [plan_of(graph_of(rank), OPTIONS, 90)[0] for rank in range(2)]
    stored = write_ranks([list(one.tensors.values()) for one in pieces], made.__getitem__, tmp_path)
    for rank, weights in enumerate(stored):
        for key, axis in (("up", 0), ("down", 1), ("head", 0), ("w.norm", None)):
            item = weights[key]
            own = rank == 1 and axis is not None
            assert item.file is not None
            assert item.file.startswith("weights-rank1-" if own else "weights-0")
            with safe_open(tmp_path / item.file, "pt") as file:
                wanted = made[key] if axis is None else made[f"w.{key}"].chunk(2, axis)[rank]
                assert torch.equal(file.get_tensor(key).view(torch.float16), wanted)


def test_ranks_that_are_cut_otherwise() -> None:
    one = plan_of(graph_of(0), OPTIONS, 90)[1]
    other = plan_of(parse(str(graph_of(1)).replace("silu(", "relu(")), OPTIONS, 90)[1]
    with pytest.raises(AssertionError, match="of rank 1 is"):
        check_alike([one, other])
