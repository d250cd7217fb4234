"""Exchanges between ranks: their types, their meaning in the interpreter, and ranks that do not fit together."""

from __future__ import annotations

import pytest
import torch

from compiler.ir.parser import parse
from compiler.ir.ranks import run_ranks
from compiler.ir.verify import verify
from specs.errors import SpecRTError

GRAPH = """
graph g(%x: f16[T,4]) {{
  dim T in 1..1..8
  %w: f16[2,4] = weight() {{name = "w"}}
  %part: f16[1,4] = slice(%w) {{axis = -2, start = {rank}, stop = {stop}}}
  %y: f16[T,1] = matmul(%x, %part) {{transpose_b = true}}
  %z: f16[T,2] = all_gather(%y) {{axis = -1, ranks = 2}}
  %s: f16[T,1] = all_reduce(%y) {{ranks = 2}}
  return z = %z, s = %s
}}
"""


def graphs() -> list[str]:
    return [GRAPH.format(rank=rank, stop=rank + 1) for rank in range(2)]


def test_what_ranks_exchange() -> None:
    each = [parse(text) for text in graphs()]
    for graph in each:
        verify(graph)
        assert parse(str(graph)) == graph
    x, w = torch.randn(3, 4).half(), torch.randn(2, 4).half()
    found = run_ranks(each, {"x": x}, lambda _: w)
    assert torch.equal(found["z"], x @ w.T)
    columns = (x @ w.T).float()
    assert torch.equal(found["s"], columns.sum(-1, keepdim=True).half())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{ranks = 2}", "{ranks = 1}", "between 1 ranks"),
        ("{axis = -1, ranks = 2}", "{axis = -2, ranks = 2}", "can't gather"),
        ("{axis = -1, ranks = 2}", "{axis = 0, ranks = 2}", "can't gather"),
    ],
)
def test_what_is_no_exchange(old: str, new: str, message: str) -> None:
    with pytest.raises(SpecRTError, match=message):
        verify(parse(graphs()[0].replace(old, new)))


def test_ranks_that_do_not_fit_together() -> None:
    one, two = (parse(text) for text in graphs())
    x, w = torch.randn(3, 4).half(), torch.randn(2, 4).half()
    with pytest.raises(ValueError, match="3 ranks run a graph for 2"):
        run_ranks([one, two, two], {"x": x}, lambda _: w)
    differ = parse(graphs()[1].replace("return z = %z", "return z = %y"))
    with pytest.raises(ValueError, match="of rank 1 is not that of rank 0"):
        run_ranks([one, differ], {"x": x}, lambda _: w)


def test_what_one_rank_raises_ends_all() -> None:
    one, two = (parse(text) for text in graphs())

    def weights(_: str) -> torch.Tensor:
        raise KeyError("w")

    with pytest.raises(KeyError):
        run_ranks([one, two], {"x": torch.randn(3, 4).half()}, weights)
