"""What every part builder needs: the equations so far, the values of expressions, and the weights declared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from compiler.ir import Builder, TensorType, Value
from compiler.ir.core import Arg, AttrValue
from compiler.ir.names import expand, index_text
from specs.errors import Where
from specs.expressions import Expr
from specs.node import Node
from specs.weight_map import WeightDecl


@dataclass(frozen=True)
class Round:
    """Where in a `repeat` the builder is: layer number = stride * i + start for i below count."""

    prefix: str
    stride: int
    start: int
    count: int


class Context:
    """Builds one graph for sequences of at most `longest` tokens; `config` holds the spec's names, `layer` is added
    inside `repeat`.
    """

    def __init__(self, config: Mapping[str, Any], longest: int) -> None:
        self.longest = longest
        self.builder = Builder()
        self.weights: dict[str, WeightDecl] = {}
        self.inputs: dict[str, Value] = {}
        self.where: Where | None = None
        self._config = dict(config)
        self._round: Round | None = None
        self._shared: dict[object, Any] = {}

    # -- expressions -----------------------------------------------------------------------------------------------

    @property
    def env(self) -> dict[str, Any]:
        """Names that an expression may use here."""
        if self._round is None:
            return self._config
        return {**self._config, "layer": self._round.start}

    def flag(self, expr: Expr | None) -> bool:
        """A yes-or-no expression; left out it is no."""
        return expr is not None and expr.as_bool(self.env)

    def option(self, node: Node, field: str, absent: str = "") -> str:
        """The value of a closed text field, or `absent` where it is left out."""
        return absent if getattr(node, field) is None else node.choice(field, self.env)

    def dimension(self, name: str) -> int:
        """The config name `name`, which the check of specs has found there."""
        return int(self._config[name])

    @contextmanager
    def in_round(self, at: Round) -> Iterator[None]:
        """Build one layer of a `repeat`."""
        self._round = at
        try:
            yield
        finally:
            self._round = None

    @contextmanager
    def at(self, where: Where | None) -> Iterator[None]:
        """Give the equations emitted inside the place `where`."""
        before, self.builder.where = self.builder.where, where
        try:
            yield
        finally:
            self.builder.where = before

    # -- equations -------------------------------------------------------------------------------------------------

    def emit(self, op: str, *args: Arg, to: str, **attrs: Any) -> Value:
        """Append an equation."""
        return self.builder.emit(op, *args, to=to, **attrs)

    def const(self, value: AttrValue, kind: TensorType, to: str) -> Value:
        """Append a constant."""
        return self.builder.emit("const", to=to, type=kind, value=value)

    def input(self, name: str, dtype: str, *shape: int | str) -> Value:
        """The graph input of that name, declared on first use."""
        if name not in self.inputs:
            self.inputs[name] = self.builder.input(name, dtype, *shape)
        return self.inputs[name]

    def shared(self, key: object, make: Callable[[], Any]) -> Any:
        """What `make` builds, once per graph and before any `repeat`."""
        if key not in self._shared:
            with self.builder.hoisted():
                self._shared[key] = make()
        return self._shared[key]

    def weight(self, leaf: str, suffix: str, *shape: int) -> Value:
        """The weight `leaf.suffix` (`attn.q`, `weight`), of this layer where inside `repeat`."""
        at = self._round
        if at is None:
            return self.global_weight(leaf, suffix, *shape)
        template = f"{at.prefix}.{index_text(at.stride, at.start)}.{leaf}.{suffix}"
        for index in range(at.count):
            layer = at.stride * index + at.start
            self._declare(expand(template, index), leaf, suffix, layer, shape)
        kind = TensorType("f32", shape)
        return self.builder.emit("weight", to=f"{leaf}.{suffix}", type=kind, name=template)

    def global_weight(self, leaf: str, suffix: str, *shape: int) -> Value:
        """The weight `leaf.suffix` that all layers share."""
        name = f"{leaf}.{suffix}"
        self._declare(name, leaf, suffix, None, shape)
        kind = TensorType("f32", shape)
        value: Value = self.shared(("weight", name), lambda: self.builder.emit("weight", to=name, type=kind, name=name))
        return value

    def _declare(self, name: str, leaf: str, suffix: str, layer: int | None, shape: tuple[int, ...]) -> None:
        where = self.builder.where
        self.weights.setdefault(name, WeightDecl(name, leaf, suffix, layer, shape, where))
