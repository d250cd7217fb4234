"""Graph -> what a picture shows: a node for each operation, with weights written in the node that uses them.

What depends on weights and constants only is no node: it becomes a line in its consumer. So does an input that joins a
node with other operands (the block table of attention). A `repeat` is a node with a scene inside, whose ports are the
values that go in and come out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compiler.ir.core import Block, Equation, Graph, Value, used_values
from compiler.ir.ops import REGISTRY
from compiler.ir.printer import print_equation

KINDS = {
    "matmul": "product",
    "gather": "product",
    "gather_matmul": "product",
    "attention": "attention",
    "paged_attention": "attention",
    "cached_attention": "attention",
    "softmax": "attention",
    "rms_norm": "norm",
    "layer_norm": "norm",
    "rotate": "position",
    **dict.fromkeys(("reshape", "transpose", "concat", "slice", "cast"), "movement"),
}


@dataclass(frozen=True)
class Node:
    """A box: its first line, its second, further ones; `kind` decides the colour and `detail` shows on hovering."""

    id: str
    title: str
    subtitle: str
    notes: tuple[str, ...]
    kind: str
    detail: str = ""
    inner: Scene | None = None


@dataclass(frozen=True)
class Edge:
    """A value that goes from one node to another, named by their ids; a `port` is the id of a node inside."""

    source: str
    target: str
    source_port: str | None = None
    target_port: str | None = None


@dataclass(frozen=True)
class Scene:
    """Nodes in the graph's order, and edges between them."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


def scene(graph: Graph) -> Scene:
    """The scene of a whole graph, with its inputs and outputs."""
    builder = _Builder("")
    needed = {value.name for value in _drawn_inputs(graph)}
    for value in graph.inputs:
        if value.name in needed:
            builder.add(Node(value.name, value.name, str(value.type), (), "input"), value)
        else:
            builder.constants[value.name] = value.name
    builder.equations(graph.equations)
    for name, value in graph.outputs:
        builder.nodes.append(Node(f"output {name}", name, str(value.type), (), "output"))
        builder.edge(value, f"output {name}")
    return builder.scene()


def _drawn_inputs(graph: Graph) -> Iterator[Value]:
    """Inputs that are the only computed operand of some equation; the others are written where they are used."""
    still = {value.name for value in graph.inputs}

    def visit(equations: tuple[Equation, ...], known: set[str]) -> Iterator[Value]:
        known = set(known)
        for equation in equations:
            if equation.body is not None:
                yield from visit(equation.body.equations, known)
                continue
            moving = [value for value in equation.values if value.name not in known]
            if not moving and _is_source(equation):
                known.add(equation.results[0].name)
            elif not moving:
                known.update(value.name for value in equation.results)
            elif all(value.name in still for value in moving):
                yield moving[0]

    return visit(graph.equations, set())


def _is_source(equation: Equation) -> bool:
    return REGISTRY[equation.op].source


class _Builder:
    """Collects the nodes of one block; `prefix` keeps ids of inner blocks apart."""

    def __init__(self, prefix: str, constants: dict[str, str] | None = None) -> None:
        self.prefix = prefix
        self.nodes: list[Node] = []
        self.edges: list[Edge] = []
        self.home: dict[str, tuple[str, str | None]] = {}  # value -> node, port
        self.constants: dict[str, str] = dict(constants or {})  # value -> how a consumer writes it

    def scene(self) -> Scene:
        return Scene(tuple(self.nodes), tuple(dict.fromkeys(self.edges)))

    def add(self, node: Node, *results: Value) -> None:
        self.nodes.append(node)
        self.home.update((value.name, (node.id, None)) for value in results)

    def edge(self, value: Value, target: str, port: str | None = None) -> None:
        if value.name in self.home:
            source, source_port = self.home[value.name]
            self.edges.append(Edge(source, target, source_port, port))

    def equations(self, equations: tuple[Equation, ...]) -> None:
        for equation in equations:
            if equation.body is not None:
                self.repeat(equation, equation.body)
            elif all(value.name in self.constants for value in equation.values):
                self.constant(equation)
            else:
                self.equation(equation)

    def constant(self, equation: Equation) -> None:
        value = equation.results[0]
        shape = "×".join(str(dim) for dim in value.type.shape)
        parts = ", ".join(item.name.removesuffix(".weight") for item in equation.values)
        text = f"{value.name} {shape}".strip()
        self.constants[value.name] = f"{text} = {equation.op}({parts})" if parts else text

    def equation(self, equation: Equation) -> None:
        result = equation.results[0]
        notes = [
            self.constants[value.name].removeprefix(f"{result.name}.")  # `attn.o` says so already
            for value in equation.values
            if value.name in self.constants
        ]
        notes += [str(arg) for arg in equation.args if isinstance(arg, (int, float)) and not isinstance(arg, bool)]
        subtitle = f"{result.name}: {result.type}"
        place = equation.where
        detail = print_equation(equation)
        if place is not None:  # not the whole path: a picture is passed on
            detail += f"\n{Path(place.file).name}:{place.line}:{place.column}"
        identity = self.prefix + result.name
        self.add(
            Node(identity, equation.op, subtitle, tuple(_wrapped(notes)), KINDS.get(equation.op, "pointwise"), detail),
            *equation.results,
        )
        for value in equation.values:
            self.edge(value, identity)

    def repeat(self, equation: Equation, body: Block) -> None:
        identity = self.prefix + equation.results[0].name
        inner = _Builder(f"{identity}/", self.constants)
        own = {value.name for value in body.params}
        own.update(value.name for item in body.equations for value in item.results)
        captured = {
            value.name: value
            for item in body.equations
            for value in used_values(item)
            if value.name in self.home and value.name not in own
        }
        for value, origin in [*zip(body.params, equation.values, strict=True), *((v, v) for v in captured.values())]:
            port = f"{inner.prefix}in {value.name}"
            inner.add(Node(port, value.name, "", (), "port in"), value)
            self.edge(origin, identity, port)
        inner.equations(body.equations)
        for carried, result in zip(body.results, equation.results, strict=True):
            port = f"{inner.prefix}out {result.name}"
            inner.nodes.append(Node(port, result.name, "", (), "port out"))
            inner.edge(carried, port)
            self.home[result.name] = (identity, port)
        title = f"repeat × {equation.attr['count']}"
        self.nodes.append(Node(identity, title, "", (), "repeat", "", inner.scene()))


def _wrapped(notes: list[str], width: int = 44) -> Iterator[str]:
    """Notes joined into lines of about `width` characters."""
    line = ""
    for note in notes:
        if line and len(line) + len(note) + 3 > width:
            yield line
            line = note
        else:
            line = f"{line} · {note}" if line else note
    if line:
        yield line
