"""Pictures of a graph: `svg(graph)` is a file by itself, `mermaid(graph)` is text that Markdown viewers draw."""

from compiler.draw.mermaid import mermaid
from compiler.draw.scene import Edge, Node, Scene, scene
from compiler.draw.svg import svg

__all__ = ["Edge", "Node", "Scene", "mermaid", "scene", "svg"]
