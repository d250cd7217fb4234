"""Scene -> SVG, a file by itself: own colours for light and dark, no script, no font to load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from compiler.draw.layout import Box, Layout, place
from compiler.draw.scene import Edge, Node, Scene, scene
from compiler.ir import Graph

LINE, CHAR, PAD = 15.0, 6.7, 9.0  # height of a line of text, width of a character, space inside a box
HEADER, MARGIN, TITLE = 26.0, 18.0, 34.0

# kind: fill and edge on light, fill and edge on dark
COLOURS = {
    "input": ("#24292f", "#24292f", "#d0d7de", "#d0d7de"),
    "output": ("#24292f", "#24292f", "#d0d7de", "#d0d7de"),
    "product": ("#dbeafe", "#3b82f6", "#172f52", "#60a5fa"),
    "attention": ("#ede4fd", "#8b5cf6", "#33225c", "#a78bfa"),
    "norm": ("#dcf5e3", "#22a35a", "#133a24", "#4ade80"),
    "position": ("#fdebd2", "#e08a1e", "#43300f", "#fbbf24"),
    "pointwise": ("#fdf6c8", "#c9a50c", "#3b3510", "#e3c93d"),
    "movement": ("#f1f3f5", "#adb5bd", "#262c34", "#6b7683"),
    "repeat": ("#8b94a00f", "#8b94a0", "#8b94a01a", "#6b7683"),
    "port": ("#ffffff", "#8b94a0", "#0d1117", "#8b94a0"),
}


@dataclass(frozen=True)
class _Placed:
    layout: Layout
    boxes: Mapping[str, Box]
    inner: Mapping[str, _Placed]


def svg(graph: Graph) -> str:
    """A picture: `repeat` drawn once, weights in the box that uses them, a box tells its equation on hovering."""
    whole = scene(graph)
    placed = _place(whole)
    width = max(placed.layout.width, (len(graph.name) + 8) * CHAR * 1.4) + 2 * MARGIN
    height = placed.layout.height + 2 * MARGIN + TITLE
    count = len(graph.equations) + sum(len(e.body.equations) for e in graph.equations if e.body is not None)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label={quoteattr(f"graph {graph.name}")}>',
        f"<style>{_style()}</style>",
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        '<path class="tip" d="M0 0.8 L8 4 L0 7.2 z"/></marker></defs>',
        '<rect class="page" width="100%" height="100%" rx="8"/>',
        f'<text class="name" x="{MARGIN}" y="{MARGIN + 10:.0f}">{escape(graph.name)}'
        f'<tspan class="sub" dx="10">{count} equations · {escape(_dims(graph))}</tspan></text>',
        f'<g transform="translate({MARGIN} {MARGIN + TITLE})">',
        *_draw(whole, placed),
        "</g>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _dims(graph: Graph) -> str:
    return ", ".join(f"{sym.name} {sym.lo}..{sym.hi:,}" for sym in graph.dims)


def _style() -> str:
    """Classes for all kinds; a viewer that knows nothing of dark mode shows the light ones on their own page colour."""
    light = [_rules(kind, fill, edge) for kind, (fill, edge, _, _) in COLOURS.items()]
    dark = [_rules(kind, fill, edge) for kind, (_, _, fill, edge) in COLOURS.items()]
    return (
        "text{font:11px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#24292f}"
        ".name{font-size:15px;font-weight:bold}.op{font-weight:bold}.sub{font-size:11px;font-weight:normal;fill:#57606a}"
        ".page{fill:#ffffff}.on{fill:#ffffff}.edge{fill:none;stroke:#8b94a0;stroke-width:1.2}.tip{fill:#8b94a0}"
        + "".join(light)
        + "@media (prefers-color-scheme:dark){text{fill:#e6edf3}.sub{fill:#9aa5b1}.page{fill:#0d1117}.on{fill:#0d1117}"
        + "".join(dark)
        + "}"
    )


def _rules(kind: str, fill: str, edge: str) -> str:
    return f".{kind}{{fill:{fill};stroke:{edge}}}"


# -- sizes and positions ----------------------------------------------------------------------------------------------


def _place(what: Scene) -> _Placed:
    inner = {node.id: _place(node.inner) for node in what.nodes if node.inner is not None}
    boxes = {node.id: _box(node, inner.get(node.id)) for node in what.nodes}
    return _Placed(place(boxes, [(edge.source, edge.target) for edge in what.edges]), boxes, inner)


def _box(node: Node, inner: _Placed | None) -> Box:
    if inner is not None:
        return Box(inner.layout.width + 2 * PAD, inner.layout.height + HEADER)
    if node.kind.startswith("port"):
        return Box(len(node.title) * CHAR + 2 * PAD, 18.0, "top" if node.kind == "port in" else "bottom")
    longest = max(len(line) for line in (node.title, node.subtitle, *node.notes))
    return Box(longest * CHAR + 2 * PAD, (2 + len(node.notes)) * LINE + PAD)


# -- drawing ----------------------------------------------------------------------------------------------------------


def _draw(what: Scene, placed: _Placed) -> Iterator[str]:
    clusters = [node for node in what.nodes if node.inner is not None]
    for node in clusters:
        yield from _frame(node, placed)
    for edge, path in zip(what.edges, _paths(what, placed), strict=True):
        yield f'<path class="edge" marker-end="url(#arrow)" d="{path}"><title>{escape(edge.source)}</title></path>'
    for node in what.nodes:
        if node.inner is not None:
            x, y = _corner(node.id, placed)
            yield f'<g transform="translate({x + PAD:.1f} {y + (HEADER - 9):.1f})">'
            yield from _draw(node.inner, placed.inner[node.id])
            yield "</g>"
        else:
            yield from _node(node, placed)


def _corner(identity: str, placed: _Placed) -> tuple[float, float]:
    return placed.layout.x[identity] - placed.boxes[identity].width / 2, placed.layout.y[identity]


def _frame(node: Node, placed: _Placed) -> Iterator[str]:
    x, y = _corner(node.id, placed)
    box = placed.boxes[node.id]
    yield f'<rect class="repeat" x="{x:.1f}" y="{y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="10"/>'
    yield f'<text class="op" x="{x + PAD:.1f}" y="{y - 6:.1f}">{escape(node.title)}</text>'


def _node(node: Node, placed: _Placed) -> Iterator[str]:
    x, y = _corner(node.id, placed)
    box = placed.boxes[node.id]
    middle = x + box.width / 2
    kind = node.kind.split()[0]
    radius = 9 if kind in ("port", "input", "output") else 5
    yield "<g>"
    if node.detail:
        yield f"<title>{escape(node.detail)}</title>"
    yield (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="{radius}"/>'
    )
    lines = [line for line in (node.title, node.subtitle, *node.notes) if line]
    first = y + (box.height - len(lines) * LINE) / 2 + 11
    for number, line in enumerate(lines):
        style = "op" if number == 0 and kind != "port" else "sub"
        if kind in ("input", "output"):
            style = "op on" if number == 0 else "on"
        yield (
            f'<text class="{style}" text-anchor="middle" x="{middle:.1f}" y="{first + number * LINE:.1f}">'
            f"{escape(line)}</text>"
        )
    yield "</g>"


def _paths(what: Scene, placed: _Placed) -> Iterator[str]:
    ends: dict[str, list[int]] = {}
    for number, edge in enumerate(what.edges):
        ends.setdefault(edge.target, []).append(number)
    starts = [_start(edge, placed) for edge in what.edges]
    for number, edge in enumerate(what.edges):
        route = placed.layout.points[number]
        before = [route_of[-1][0] if (route_of := placed.layout.points[i]) else starts[i][0] for i in ends[edge.target]]
        rank = sorted(range(len(before)), key=before.__getitem__).index(ends[edge.target].index(number))
        yield _curve([starts[number], *route, _end(edge, placed, rank, len(before))])


def _start(edge: Edge, placed: _Placed) -> tuple[float, float]:
    bottom = placed.layout.y[edge.source] + placed.boxes[edge.source].height
    if edge.source_port is None:
        return placed.layout.x[edge.source], bottom
    corner = _corner(edge.source, placed)[0] + PAD
    return corner + placed.inner[edge.source].layout.x[edge.source_port], bottom


def _end(edge: Edge, placed: _Placed, rank: int, count: int) -> tuple[float, float]:
    top = placed.layout.y[edge.target]
    if edge.target_port is not None:
        corner = _corner(edge.target, placed)[0] + PAD
        return corner + placed.inner[edge.target].layout.x[edge.target_port], top - 1
    step = min(16.0, placed.boxes[edge.target].width / (count + 1))
    return placed.layout.x[edge.target] + (rank - (count - 1) / 2) * step, top - 1


def _curve(points: list[tuple[float, float]]) -> str:
    """A line through points that leaves and enters each of them vertically."""
    (x, y), *rest = points
    text = f"M{x:.1f} {y:.1f}"
    for nx, ny in rest:
        if abs(nx - x) < 0.5:
            text += f" L{nx:.1f} {ny:.1f}"
        else:
            bend = (ny - y) / 2
            text += f" C{x:.1f} {y + bend:.1f} {nx:.1f} {ny - bend:.1f} {nx:.1f} {ny:.1f}"
        x, y = nx, ny
    return text
