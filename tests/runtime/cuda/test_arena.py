"""Values share memory where they never live together, and only there."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from runtime.cuda.arena import ALIGN, Interval, aligned, intervals, place
from runtime.program import Port, Program, Step

LIVES = st.builds(
    lambda size, first, length: (size, first, first + length),
    st.integers(1, 5000), st.integers(0, 12), st.integers(0, 6),
)  # fmt: skip


@given(st.lists(LIVES, max_size=20))
def test_nothing_that_lives_together_overlaps(lives: list[tuple[int, int, int]]) -> None:
    items = [Interval(str(number), *life) for number, life in enumerate(lives)]
    offsets, total = place(items)
    for item in items:
        assert offsets[item.name] % ALIGN == 0
        assert offsets[item.name] + item.size <= total
        for other in items:
            if item.name < other.name and item.first <= other.last and other.first <= item.last:
                low, high = sorted((item, other), key=lambda one: offsets[one.name])
                assert offsets[low.name] + low.size <= offsets[high.name]
    busiest = max((sum(aligned(i.size) for i in items if i.first <= at <= i.last) for at in range(20)), default=0)
    assert busiest <= total <= sum(aligned(item.size) for item in items)


def chain(layers: int) -> Program:
    """x -> y -> x -> ... each step reads the value before; the first value is an input, the last an output."""
    names = [f"v{number}" for number in range(layers + 1)]
    steps = tuple(
        Step("engine", "tensorrt", "segments/a.ir", {"x": before}, {"y": after}, {})
        for before, after in pairwise(names)
    )
    port = Port("v0", "f16", ("T", 100))
    return Program(
        inputs=(port,), outputs=(Port("logits", "f16", ("T", 100)),), values={"logits": names[-1]}, steps=steps,
        dims={"T": (1, 8, 64)}, cache=None, types={name: Port(name, "f16", ("T", 100)) for name in names},
    )  # fmt: skip


def test_a_chain_of_any_depth_needs_two_places() -> None:
    for layers in (2, 3, 50):
        items = intervals(chain(layers), {"T": 64})
        assert {item.size for item in items} == {64 * 100 * 2}
        assert "v0" not in {item.name for item in items}  # inputs lie elsewhere
        assert place(items)[1] == 2 * aligned(64 * 100 * 2)


def test_outputs_live_to_the_end() -> None:
    program = chain(3)
    kept = Program(**{**vars(program), "values": {"hidden": "v1", "logits": "v3"}})
    offsets, total = place(intervals(kept, {"T": 64}))
    assert total == 3 * aligned(64 * 100 * 2)
    assert len(set(offsets.values())) == 3
