"""A spec's equations in one form, whatever its parts are called: what enters the layers, a layer, what leaves them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from specs.equations import BinOp, Call, Constant, Equation, IfExp, Name, Repeat, Step, Value, equations, walk
from specs.parts import PartBase
from specs.schema import Spec
from specs.wording import Words

FEED_FORWARD = ("mlp", "gated_mlp", "moe")
NORMS = ("rms_norm", "layer_norm")

# The usual layers: all of a layer as one expression of x, norms numbered as they stand.
LAYERS = {
    "x + attn(norm_1(x)) + mlp(norm_2(x + attn(norm_1(x))))": (
        "attention, then MLP, each added to x from its own norm of x"
    ),
    "norm_1(mlp(norm_2(x + attn(x))) + norm_2(x + attn(x)))": (
        "attention, then MLP, each added to x and followed by a norm of the sum"
    ),
    "x + attn(norm(x)) + mlp(norm(x))": "attention and MLP side by side, both added to x from one norm of x",
    "x + attn(norm_1(x)) + mlp(norm_2(x))": "attention and MLP side by side, each added to x from its own norm of x",
    "x + norm_1(attn(norm_2(x))) + norm_3(mlp(norm_4(x + norm_1(attn(norm_2(x))))))": (
        "attention, then MLP, each between two norms and added to x"
    ),
    "x + norm_1(attn(x)) + norm_2(mlp(x + norm_1(attn(x))))": (
        "attention, then MLP, each followed by a norm and added to x"
    ),
}
_PLACES = (
    "before each",
    "after each sum",
    "one before both (side by side)",
    "before each (side by side)",
    "around each",
    "after each",
)
SHORT = dict(zip(LAYERS.values(), _PLACES, strict=True))
"""The same for tables: where the norms of a layer stand."""
BY_DEFAULT = " (by default: config.json may say otherwise)"
_NORM = re.compile(r"norm@(\w+)")


def symbol(part: PartBase) -> str:
    """`attn`, `mlp`, `norm`, else the kind."""
    kind = part.kind_name()
    if "attention" in kind:
        return "attn"
    return "mlp" if kind in FEED_FORWARD else "norm" if kind in NORMS else kind


@dataclass(frozen=True)
class Form:
    """What enters the layers, a layer in words or as its equations, what leaves them."""

    enter: str
    layer: str
    leave: str


def form(spec: Spec, words: Words) -> Form:
    """The wiring of a spec; conditions that have a value, or a default, are decided."""
    repeats = [step for step in spec.graph if isinstance(step, Repeat)]
    first = spec.graph.index(repeats[0]) if repeats else len(spec.graph)
    before = _there(spec.graph[:first], words)
    after = _there(spec.graph[first:], words)
    enter = _Reader(spec, words, {}).run(before)
    later = [*(line for repeat in repeats for line in repeat.body), *after]
    read = {node.id for node in _nodes(later) if isinstance(node, Name)}
    streams = [name for name in enter if name in read]
    carried = dict.fromkeys(streams, "x") if len(streams) == 1 else {name: name for name in streams}
    leave = _Reader(spec, words, carried).run(after)
    return Form(
        _numbered("; ".join(enter[name] for name in streams)),
        "; then ".join(_layer(spec, words, carried, repeat) for repeat in repeats),
        _numbered("; ".join(f"{name} = {leave[name]}" for name in spec.outputs if name in leave)),
    )


def _there(steps: Sequence[Step], words: Words) -> list[Equation]:
    """The equations outside of layers whose condition holds, or may hold."""
    lines = [step for step in steps if isinstance(step, Equation)]
    return [line for line in lines if line.when is None or words.truth(line.when) is not False]


def used_parts(spec: Spec, words: Words) -> list[str]:
    """The parts that the graph reaches, in the order of the file; all of them where conditions are open."""
    reached: set[str] = set()

    def visit(node: Value) -> None:
        truth = words.truth(node.test) if isinstance(node, IfExp) and words.env is not None else None
        if isinstance(node, IfExp):
            for branch in [node.body, node.orelse] if truth is None else [node.body if truth else node.orelse]:
                visit(branch)
        elif isinstance(node, BinOp):
            visit(node.left)
            visit(node.right)
        elif isinstance(node, Call):
            reached.add(node.func)
            for arg in node.args:
                visit(arg)

    for step in equations(spec.graph):
        if words.env is None or _there([step], words):
            visit(step.value)
    return [name for name in spec.parts if name in reached]


def _layer(spec: Spec, words: Words, carried: Mapping[str, str], repeat: Repeat) -> str:
    inlined = _Reader(spec, words, carried, whole=True).run(repeat.body)
    whole = _numbered("; ".join(inlined[name] for name in carried))
    own = {target: target for line in repeat.body for target in line.targets if target not in carried}
    reader = _Reader(spec, words, {**carried, **own})
    lines = []
    for line in repeat.body:
        left = ", ".join(carried.get(target, target) for target in line.targets)
        lines.append(f"{left} = {reader.text(line.value)}")
    decided = any(isinstance(node, IfExp) and words.truth(node.test) is not None for node in _nodes(repeat.body))
    doubt = BY_DEFAULT if decided and words.env is None else ""
    return LAYERS.get(whole, _numbered("; ".join(lines))) + doubt


def _nodes(lines: Sequence[Equation]) -> Iterator[Value]:
    for line in lines:
        yield from walk(line.value)


def _numbered(text: str) -> str:
    """Norms by number, in the order in which they stand; a single one needs none."""
    order = list(dict.fromkeys(_NORM.findall(text)))
    return _NORM.sub(lambda match: f"norm_{order.index(match[1]) + 1}" if len(order) > 1 else "norm", text)


class _Reader:
    """Equations, with earlier results written out; a norm is `norm@its_name` until all are numbered."""

    def __init__(self, spec: Spec, words: Words, start: Mapping[str, str], *, whole: bool = False) -> None:
        self.spec, self.words, self.whole = spec, words, whole
        self.scope = dict(start)

    def run(self, lines: Sequence[Equation]) -> dict[str, str]:
        """The text of every name after these equations."""
        for line in lines:
            text = self.text(line.value)
            for index, target in enumerate(line.targets):
                self.scope[target] = text if len(line.targets) == 1 else f"{text}[{index}]"
        return self.scope

    def text(self, node: Value) -> str:
        """One value; the terms of a sum in one order."""
        if isinstance(node, Name):
            return self.scope.get(node.id, node.id)
        if isinstance(node, Constant):
            return self.words.of(node.expr)
        if isinstance(node, Call):
            return f"{self._name(node.func)}({', '.join(self.text(arg) for arg in node.args)})"
        if isinstance(node, IfExp):
            return self._choice(node)
        assert isinstance(node, BinOp)
        if node.op == "+":
            terms = self._terms(node)
            if self.whole:  # experts and a shared expert beside them are one MLP
                terms = [term for at, term in enumerate(terms) if not (term.startswith("mlp(") and term in terms[:at])]
            return " + ".join(sorted(terms, key=lambda term: (term != "x", _NORM.sub("norm", term))))
        return f"{self._factor(node.left)} {node.op} {self._factor(node.right)}"

    def _terms(self, node: Value) -> list[str]:
        """The terms of a sum, sums that are its terms written out."""
        if isinstance(node, BinOp) and node.op == "+":
            return [*self._terms(node.left), *self._terms(node.right)]
        return _split_sum(self.text(node))

    def _factor(self, node: Value) -> str:
        text = self.text(node)
        return f"({text})" if len(_split_sum(text)) > 1 else text

    def _name(self, func: str) -> str:
        part = self.spec.parts.get(func)
        word = func if part is None else symbol(part)
        return f"norm@{func}" if word == "norm" else word

    def _choice(self, node: IfExp) -> str:
        truth = self.words.truth(node.test)
        if truth is not None:
            return self.text(node.body if truth else node.orelse)
        first, second = self.text(node.body), self.text(node.orelse)
        return first if first == second else f"({first} if {self.words.of(node.test)} else {second})"


def _split_sum(text: str) -> list[str]:
    """The terms of `a + b(c + d)`."""
    terms, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and text.startswith(" + ", at):
            terms.append(text[start:at])
            start = at + 3
    return [*terms, text[start:]]
