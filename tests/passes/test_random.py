"""Passes on random graphs: they hold for whatever is well typed, not for models alone."""

from __future__ import annotations

from contextlib import suppress

import torch
from hypothesis import assume, given, settings

from compiler.ir import Graph, walk
from compiler.ir.interpreter import run, torch_dtype
from compiler.ir.names import expand
from compiler.passes.assign_precision import assign_precision
from compiler.passes.fold_constants import FOLD_CONSTANTS
from compiler.passes.fuse_attention import FUSE_ATTENTION
from compiler.passes.fuse_gated_mlp import FUSE_GATED_MLP
from compiler.passes.fuse_norm import FUSE_NORM
from compiler.passes.fuse_qkv import FUSE_QKV
from compiler.passes.insert_kv_cache import INSERT_KV_CACHE
from compiler.passes.pack_tokens import PACK_TOKENS
from compiler.passes.runner import Pass, run_passes
from compiler.passes.select_rows import SELECT_ROWS
from tests.ir.strategies import graphs

_SAME = (FUSE_NORM, FUSE_ATTENTION, FUSE_GATED_MLP, FUSE_QKV, FOLD_CONSTANTS)


def compute(graph: Graph) -> dict[str, torch.Tensor] | None:
    """The outputs; None where PyTorch has no kernel for an element type or an index is out of range."""
    generator = torch.Generator().manual_seed(3)
    sizes = {"B": 3, "S": 5}
    feed = {}
    for value in graph.inputs:
        shape = [sizes.get(str(dim), dim) for dim in value.type.shape]
        tensor = torch.rand([int(size) for size in shape], generator=generator) * 3
        feed[value.name] = tensor.to(torch_dtype(value.type.dtype))
    shapes: dict[str, tuple[int, ...]] = {}
    for top in graph.equations:
        rounds = top.attr.get("count", 1)
        assert isinstance(rounds, int)
        for equation in walk((top,)):
            if equation.op == "weight":
                names = {expand(str(equation.attr["name"]), index) for index in range(rounds)}
                shapes.update(dict.fromkeys(names, equation.result.type.static_shape()))

    def weight(name: str) -> torch.Tensor:
        return torch.full(shapes[name], 1.25)

    with suppress(RuntimeError, NotImplementedError, IndexError, ZeroDivisionError):
        return run(graph, feed, weight)
    return None


def assert_same(graph: Graph, passes: tuple[Pass, ...]) -> None:
    want = compute(graph)
    assume(want is not None)
    assert want is not None
    done, _ = run_passes(graph, passes)
    got = compute(done)
    assert got is not None
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        # Folding computes what the interpreter would: the same bits, except the sign of zero (x + 0 is x).
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=60)
@given(graphs())
def test_outputs_stay_the_same_to_the_bit(graph: Graph) -> None:
    assert_same(graph, _SAME)


@settings(max_examples=40)
@given(graphs())
def test_folding_twice_changes_nothing_more(graph: Graph) -> None:
    once, _ = run_passes(graph, (FOLD_CONSTANTS,))
    twice, (report,) = run_passes(once, (FOLD_CONSTANTS,))
    assert (twice, report.hits) == (once, ())


@settings(max_examples=60)
@given(graphs())
def test_the_serving_passes_verify_or_refuse_with_a_reason(graph: Graph) -> None:
    optional = tuple(Pass(item.name, item.apply) for item in (INSERT_KV_CACHE, PACK_TOKENS, SELECT_ROWS))
    for precision in ("bf16", "fp16"):
        _, reports = run_passes(graph, (*optional, assign_precision(precision)))
        assert all(refusal.reason for report in reports for refusal in report.refusals)
