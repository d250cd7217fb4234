"""A spec's expressions in words, for people who compare architectures: names of ours are followed to where they come
from, and how config.json spells a key is no difference.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from specs.config import DIMENSIONS
from specs.equations import LAYER
from specs.errors import SpecRTError
from specs.expressions import Expr, dotted, literal
from specs.functions import CONSTANTS
from specs.functions import FUNCTIONS as SCALAR_FUNCTIONS
from specs.node import Options
from specs.schema import Spec

FROM_CONFIG = "config.json says"
_MAX_PERIOD = 8


class Words:
    """Words for the expressions of one spec; with values of its names, `env`, they are values, by layer if need be."""

    def __init__(self, spec: Spec, env: Mapping[str, Any] | None) -> None:
        self.spec, self.env = spec, env

    def of(self, expr: Expr | None, absent: str = "no", options: Options | None = None) -> str:
        """The expression's value, or where it comes from; `absent` where the field is left out."""
        options = options or Options(())
        if expr is None:
            return absent
        if self.env is None:
            return plain_text(self._words(expr.tree, options, list(self.spec.config)))
        env = {**{option: option for option in options.values}, **self.env}

        def value(layer: int) -> str:
            found = expr.value({**env, LAYER: layer})
            return value_text(options.spellings.get(found, found) if isinstance(found, str) else found)

        return by_layer([value(layer) for layer in range(self.layers if LAYER in expr.names() else 1)])

    @property
    def layers(self) -> int:
        """How many layers there are; 1 where that is not known."""
        return int((self.env or {}).get("layers", 1))

    def size(self, name: str) -> str:
        """A name of `config`: its value, or where it comes from."""
        if self.env is not None:
            value = self.env[name]
            return f"{value:,}" if isinstance(value, int) else value_text(value)
        names = list(self.spec.config)
        return plain_text(self._words(self.spec.config[name].tree, Options(()), names[: names.index(name)]))

    def truth(self, expr: Expr) -> bool | None:
        """A condition's value, without values of names that of their defaults; None where it depends on the layer or
        there is no default.
        """
        try:
            return expr.as_bool(self.env if self.env is not None else self._defaults())
        except SpecRTError:  # a name without a value here
            return None

    def _defaults(self) -> dict[str, Any]:
        """What the names are under an empty config.json, those that then have a value."""
        found: dict[str, Any] = {}
        for name, expr in self.spec.config.items():
            with suppress(SpecRTError):
                found[name] = expr.value(found)
        return found

    def _words(self, tree: ast.expr, options: Options, ours: list[str]) -> ast.expr:
        follow = _Follow(self.spec.config, frozenset(options.values), ours)
        return follow.visit(copy.deepcopy(tree))  # type: ignore[no-any-return]


class _Follow(ast.NodeTransformer):
    """Our names become what they stand for, keys of config.json become FROM_CONFIG."""

    def __init__(self, config: Mapping[str, Expr], options: frozenset[str], ours: list[str]) -> None:
        self.config, self.options, self.ours = config, options, ours
        self.known = {*options, *(DIMENSIONS & set(ours)), *CONSTANTS, *SCALAR_FUNCTIONS, LAYER}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self.known:
            return node
        if node.id not in self.ours:
            return ast.Name(FROM_CONFIG)
        earlier = self.ours[: self.ours.index(node.id)]  # in an expression of `config`, only those are ours
        follow = _Follow(self.config, self.options, earlier)
        return follow.visit(copy.deepcopy(self.config[node.id].tree))  # type: ignore[no-any-return]

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        path = dotted(node) or ""
        return self.visit_Name(ast.Name(path.split(".")[0]))

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        """`a | b | 1.0`: from config.json, else 1.0."""
        left, right = self.visit(node.left), self.visit(node.right)
        if not isinstance(node.op, ast.BitOr):
            return ast.BinOp(left, node.op, right)
        texts = [text for side in (left, right) for text in plain_text(side).split(", else ")]
        said = [text for text in dict.fromkeys(texts) if text != "none" or text == texts[-1]]
        return ast.Name(f"({', else '.join(said)})") if len(said) > 1 else left


def plain_text(tree: ast.expr) -> str:
    """The text of a followed tree, without the parentheses around all of it."""
    text = ast.unparse(tree)
    if isinstance(tree, ast.Name) and text.startswith("("):
        text = text[1:-1]
    if isinstance(tree, ast.Constant):
        text = text.replace("'", "")
    return re.sub(r"\btrue\b", "yes", re.sub(r"\bfalse\b", "no", text))


def value_text(value: Any) -> str:
    """A value as people write it; a mapping by its keys that say something."""
    if isinstance(value, Mapping):
        kind = value.get("rope_type", value.get("type"))
        rest = {
            k: v for k, v in sorted(value.items()) if k not in ("rope_type", "type", "rope_theta") and v is not None
        }
        if kind == "default" and not rest:
            return "none"
        return ", ".join([*([str(kind)] if kind else []), *(f"{key} {value_text(item)}" for key, item in rest.items())])
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:g}"
    if isinstance(value, list):
        return f"{len(value)} numbers" if len(value) > 4 else "[" + ", ".join(map(value_text, value)) + "]"
    return value if isinstance(value, str) else literal(value)


def by_layer(values: list[str]) -> str:
    """`4096, none in turn`, `dense in layers 0 to 2, sparse from layer 3`, or the value that all layers share."""
    if len(set(values)) <= 1:
        return values[0] if values else ""
    runs: list[tuple[int, str]] = []
    for layer, value in enumerate(values):
        if not runs or runs[-1][1] != value:
            runs.append((layer, value))
    if len(runs) <= 3:
        ends = [start - 1 for start, _ in runs[1:]]
        parts = [
            f"{value} in layer {start}" if start == end else f"{value} in layers {start} to {end}"
            for (start, value), end in zip(runs, ends, strict=False)
        ]
        return ", ".join([*parts, f"{runs[-1][1]} from layer {runs[-1][0]}"])
    for period in range(2, _MAX_PERIOD + 1):
        if all(value == values[layer % period] for layer, value in enumerate(values)):
            return ", ".join(values[:period]) + " in turn"
    counts = {value: values.count(value) for value in values}
    return ", ".join(f"{value} in {count} layers" for value, count in counts.items())
