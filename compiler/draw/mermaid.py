"""Scene -> Mermaid's flowchart text, which GitHub and many editors draw inside Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from compiler.draw.scene import Scene, scene
from compiler.draw.svg import COLOURS
from compiler.ir import Graph


def mermaid(graph: Graph) -> str:
    """The text of a flowchart, a `repeat` as a subgraph."""
    whole = scene(graph)
    ids: dict[str, str] = {}
    lines = ["flowchart TD", *_lines(whole, ids, "  ")]
    for kind, (fill, edge, _, _) in COLOURS.items():
        text = "#ffffff" if kind in ("input", "output") else "#24292f"
        if kind != "repeat":
            lines.append(f"  classDef {kind} fill:{fill},stroke:{edge},color:{text}")
    return "\n".join(lines) + "\n"


def _lines(what: Scene, ids: dict[str, str], indent: str) -> Iterator[str]:
    for node in what.nodes:
        name = ids.setdefault(node.id, f"n{len(ids)}")
        if node.inner is not None:
            yield f'{indent}subgraph {name} ["{_escape(node.title)}"]'
            yield from _lines(node.inner, ids, indent + "  ")
            yield f"{indent}end"
            continue
        kind = node.kind.split()[0]
        text = "<br/>".join(_escape(line) for line in (node.title, node.subtitle, *node.notes) if line)
        opening, closing = ('(["', '"])') if kind in ("input", "output", "port") else ('["', '"]')
        yield f"{indent}{name}{opening}{text}{closing}:::{kind}"
    for edge in what.edges:
        yield f"{indent}{ids[edge.source_port or edge.source]} --> {ids[edge.target_port or edge.target]}"


def _escape(text: str) -> str:
    """Mermaid's own entities: quotes and angle brackets would end a label."""
    for character, entity in (("&", "#amp;"), ('"', "#quot;"), ("<", "#lt;"), (">", "#gt;")):
        text = text.replace(character, entity)
    return text
