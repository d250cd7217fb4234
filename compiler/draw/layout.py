"""Places boxes in layers, top to bottom, so that few lines cross and most run straight.

The method of Sugiyama, Tagawa and Toda (1981): layers by the longest path, a point for each layer that an edge
passes, order in a layer by the mean of its neighbours, then positions by isotonic regression: the nearest to where the
neighbours pull (least squares) with the order and the gaps kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

GAP_X, GAP_Y = 18.0, 30.0
SWEEPS = 12
POINT_WEIGHT = 6.0  # points of long edges pull harder than boxes, so that long edges are straight

Key = Hashable
K = TypeVar("K", bound=Key)


@dataclass(frozen=True)
class Box:
    """What is placed: its size, and whether it must be in the first or last layer."""

    width: float
    height: float
    pin: str = ""  # "", "top" or "bottom"


@dataclass
class Layout:
    """Centres and tops of boxes, the points between the ends of each edge, and the whole size."""

    x: dict[str, float] = field(default_factory=dict)
    y: dict[str, float] = field(default_factory=dict)
    points: list[list[tuple[float, float]]] = field(default_factory=list)
    width: float = 0.0
    height: float = 0.0


def place(boxes: Mapping[str, Box], edges: Sequence[tuple[str, str]]) -> Layout:
    """Positions for boxes and routes for edges (which must be acyclic and go forward in the order of `boxes`)."""
    layer_of = _layers(boxes, edges)
    count = max(layer_of.values(), default=-1) + 1
    rows: list[list[Key]] = [[] for _ in range(count)]
    for name in boxes:
        rows[layer_of[name]].append(name)
    chains: list[list[Key]] = []
    links: list[tuple[Key, Key]] = []
    for number, (source, target) in enumerate(edges):
        chain: list[Key] = [source]
        for layer in range(layer_of[source] + 1, layer_of[target]):
            chain.append((number, layer))
            rows[layer].append((number, layer))
        chain.append(target)
        chains.append(chain)
        links += pairwise(chain)
    above: dict[Key, list[Key]] = {key: [] for row in rows for key in row}
    below: dict[Key, list[Key]] = {key: [] for row in rows for key in row}
    for upper, lower in links:
        below[upper].append(lower)
        above[lower].append(upper)
    rows = _order(rows, above, below)
    widths = {key: boxes[key].width if isinstance(key, str) else 4.0 for row in rows for key in row}
    centres = _positions(rows, above, below, widths, _pulls(chains))
    return _finish(boxes, rows, chains, centres, widths)


def _layers(boxes: Mapping[str, Box], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The longest path from a source; sources then move down to just above what uses them."""
    before: dict[str, list[str]] = {name: [] for name in boxes}
    after: dict[str, list[str]] = {name: [] for name in boxes}
    for source, target in edges:
        before[target].append(source)
        after[source].append(target)
    layer: dict[str, int] = {}
    for name in boxes:  # in the graph's order every source is placed before its target
        layer[name] = max((layer[source] + 1 for source in before[name]), default=0)
    if any(box.pin == "top" for box in boxes.values()):
        for name, box in boxes.items():
            if box.pin != "top":
                layer[name] = max(layer[name], 1)
    for name in reversed(list(boxes)):
        if after[name] and not boxes[name].pin and len(before[name]) <= len(after[name]):
            nearest = min(layer[target] for target in after[name]) - 1
            if not before[name] or len(after[name]) == 1:
                layer[name] = max(layer[name], nearest)
    last = max(layer.values(), default=0)
    layer.update((name, last) for name, box in boxes.items() if box.pin == "bottom")
    return layer


def _order(rows: list[list[Key]], above: Mapping[Key, list[Key]], below: Mapping[Key, list[Key]]) -> list[list[Key]]:
    """The best order found by sweeping down and up."""
    best, fewest = rows, _crossings(rows, below)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        neighbours = above if down else below
        rows = [list(row) for row in rows]
        for index in range(1, len(rows)) if down else range(len(rows) - 2, -1, -1):
            fixed = {key: at for at, key in enumerate(rows[index - 1 if down else index + 1])}
            place_of = {key: at for at, key in enumerate(rows[index])}

            def pull(key: Key, fixed: dict[Key, int] = fixed, place_of: dict[Key, int] = place_of) -> float:
                near = [fixed[other] for other in neighbours[key]]  # noqa: B023 (used at once)
                return sum(near) / len(near) if near else float(place_of[key])

            rows[index].sort(key=pull)
        crossings = _crossings(rows, below)
        if crossings < fewest:
            best, fewest = rows, crossings
    return best


def _crossings(rows: Sequence[Sequence[Key]], below: Mapping[Key, list[Key]]) -> int:
    """How many pairs of lines between neighbouring rows cross."""
    total = 0
    for upper, lower in pairwise(rows):
        at = {key: index for index, key in enumerate(lower)}
        ends = [at[target] for key in upper for target in sorted(below[key], key=at.__getitem__)]
        total += sum(ends[i] > ends[j] for i in range(len(ends)) for j in range(i + 1, len(ends)))
    return total


def _pulls(chains: Sequence[Sequence[Key]]) -> dict[Key, Sequence[Key]]:
    """What a point of a long edge is drawn to: all points of its edge, so that it runs straight wherever it can."""
    return {key: chain[1:-1] if len(chain) > 3 else chain for chain in chains for key in chain[1:-1]}


def _positions(
    rows: Sequence[Sequence[Key]],
    above: Mapping[Key, list[Key]],
    below: Mapping[Key, list[Key]],
    widths: Mapping[Key, float],
    pulls: Mapping[Key, Sequence[Key]],
) -> dict[Key, float]:
    centres: dict[Key, float] = {}
    for row in rows:
        left = 0.0
        for key in row:
            centres[key] = left + widths[key] / 2
            left += widths[key] + GAP_X
    for sweep in range(5 * SWEEPS):
        neighbours = (above, below)[sweep % 2]
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted, weights = [], []
            for key in row:
                near: Sequence[Key] = neighbours[key] or [*above[key], *below[key]]
                if sweep >= 2 * SWEEPS:  # at the end both sides pull, and edges straighten
                    near = pulls.get(key) or [*above[key], *below[key]]
                wanted.append(sum(centres[other] for other in near) / len(near) if near else centres[key])
                weights.append(1.0 if isinstance(key, str) else POINT_WEIGHT)
            gaps = [(widths[a] + widths[b]) / 2 + GAP_X for a, b in pairwise(row)]
            centres.update(zip(row, spread(wanted, weights, gaps), strict=True))
    return centres


def spread(wanted: Sequence[float], weights: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """The positions nearest to `wanted` (weighted least squares) with x[i+1] - x[i] >= gaps[i].

    The algorithm is pool adjacent violators: linear, exact."""
    offsets = [0.0]
    for gap in gaps:
        offsets.append(offsets[-1] + gap)
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for target, weight, offset in zip(wanted, weights, offsets, strict=False):
        mean, total, size = target - offset, weight, 1
        while pools and pools[-1][0] >= mean:
            other, more, members = pools.pop()
            mean, total, size = (mean * total + other * more) / (total + more), total + more, size + members
        pools.append((mean, total, size))
    flat = [mean for mean, _, size in pools for _ in range(size)]
    return [mean + offset for mean, offset in zip(flat, offsets, strict=False)]


def _finish(
    boxes: Mapping[str, Box],
    rows: Sequence[Sequence[Key]],
    chains: Sequence[Sequence[Key]],
    centres: dict[Key, float],
    widths: Mapping[Key, float],
) -> Layout:
    left = min((centres[key] - widths[key] / 2 for row in rows for key in row), default=0.0)
    layout = Layout()
    bands: list[tuple[float, float]] = []
    top = 0.0
    for row in rows:
        height = max((boxes[key].height for key in row if isinstance(key, str)), default=0.0)
        bands.append((top, top + height))
        for key in row:
            if isinstance(key, str):
                layout.x[key], layout.y[key] = centres[key] - left, top
        top += height + GAP_Y
    layer = {key: index for index, row in enumerate(rows) for key in row}
    for chain in chains:
        route: list[tuple[float, float]] = []
        for key in chain[1:-1]:
            band = bands[layer[key]]
            route += [(centres[key] - left, band[0]), (centres[key] - left, band[1])]
        layout.points.append(route)
    layout.width = max((centres[key] + widths[key] / 2 - left for row in rows for key in row), default=0.0)
    layout.height = max(top - GAP_Y, 0.0)
    return layout
