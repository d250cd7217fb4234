"""Sums over ranks, in Triton's interpreter: any order in which ranks see each other's memory gives the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from compiler.kernels.build import load
from compiler.kernels.library import all_reduce
from tests.kernels.ranks import Ranks

TILE = 16
BLOCKS = 4


def reduced(
    patch: pytest.MonkeyPatch, launches: Sequence[Sequence[torch.Tensor]], seed: int, width: int = 1
) -> list[list[torch.Tensor]]:
    """What each rank has of some launches in a row, each given by what the ranks add up."""
    ranks = len(launches[0])
    dtype = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[launches[0][0].dtype]
    asked = all_reduce(dtype, width, ranks, BLOCKS, tile=TILE)
    words = torch.int32 if dtype == "f32" else torch.int16
    rooms = [torch.full((2, ranks, BLOCKS * TILE), -1, dtype=words) for _ in range(ranks)]
    found: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    kernel = load(asked)

    def work(rank: int) -> None:
        turns, stop = torch.zeros(BLOCKS, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        for sources in launches:
            source = sources[rank]
            target = torch.full_like(source, 7)
            unit = asked.constants["unit"]
            values = {f"room_{other}": room for other, room in enumerate(rooms)} | {
                "source": source, "target": target, "turns": turns, "stop": stop, "own": rooms[rank],
                "count": source.numel() // unit, "rank": rank,
            }  # fmt: skip
            given = [values[name] if kind else None for name, kind in asked.arguments]
            kernel[(-(-source.numel() // TILE), 1, 1)](*given, **asked.constants)
            found[rank].append(target)

    Ranks(patch, seed).run([lambda rank=rank: work(rank) for rank in range(ranks)])
    assert all((room == -1).all() for room in rooms)  # as the next launch wants them
    return found


def expected(sources: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros(sources[0].shape)
    for source in sources:
        total = total + source.float()
    return total.to(sources[0].dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_sum_of_all_ranks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, ranks: int) -> None:
    """Several launches of different sizes: more of them than there are rooms, and blocks that not every one has."""
    generator = torch.Generator().manual_seed(ranks)
    sizes = (33, 64, 7, 1, 50, 64, 16)
    launches = [[torch.randn(size, generator=generator).to(dtype) for _ in range(ranks)] for size in sizes]
    for seed in range(3):
        with monkeypatch.context() as patch:
            found = reduced(patch, launches, seed)
        for sources, *targets in zip(launches, *found, strict=True):
            for target in targets:
                assert torch.equal(target, expected(sources))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_number_arrives(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """All bits set, which a room is full of before numbers come, is a NaN like others; whole vectors are counted."""
    words = torch.int32 if dtype == torch.float32 else torch.int16
    special = torch.tensor([-1] * 8, dtype=words).view(dtype)
    plain = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, torch.nan, 1.0, 1e-7, -3.0]).to(dtype)
    (first,), (second,) = reduced(monkeypatch, [[torch.cat([special, plain]), torch.cat([plain, plain])]], 1, width=16)
    assert first[:8].isnan().all()
    torch.testing.assert_close(first[8:], plain + plain, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(first.view(words), second.view(words))
