"""Tensor parallelism: one rank's graph, which has its part of weights, heads and experts' features, and exchanges.

No part of a model is known by name: how each value is held follows from the operations (split_rules.py). All ranks'
graphs are alike but for the bounds of slices of weights, and lists with a number for each head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from compiler.ir.core import Arg, AttrValue, Block, Equation, Graph, Value, used_values, walk
from compiler.ir.ops import REGISTRY
from compiler.passes.rewrite import Names, beside, emit, remove_dead
from compiler.passes.runner import Log, Pass
from compiler.passes.split_layouts import Held, Layout, MismatchError, Split, Sum
from compiler.passes.split_rules import RULES, whole
from compiler.passes.split_weights import Parts
from specs.errors import Where

NAME = "split_tensors"


def split_tensors(count: int, rank: int) -> Pass:
    """The pass that makes the graph of one of `count` ranks.

    Raises SpecRTError PASS-004 where a block that shares a scale would be cut, PASS-005 where heads can't be shared.
    """
    return Pass(NAME, lambda graph, log: _split(graph, log, count, rank), required=True)


def _split(graph: Graph, log: Log, count: int, rank: int) -> Graph:
    parts: dict[str, int] = {}
    reasons: dict[str, str] = {}
    while True:  # parts only get fewer: this ends
        splitter = Splitter(graph, count, rank, parts, dict(reasons))
        try:
            done = splitter.run()
        except MismatchError as error:
            lower = {name for name in error.origins if parts.get(name, count) > error.parts}
            if not lower:
                raise AssertionError(f"{error} at {sorted(error.origins)}, split no more") from error
            parts.update(dict.fromkeys(lower, error.parts))
            reasons.update(dict.fromkeys(lower, error.reason))
            continue
        log.hits += splitter.log.hits
        for name, reason in splitter.reasons.items():
            if parts.get(name, 1) == 1:
                log.refuse(NAME, name, splitter.made[name].where, reason)
        return remove_dead(done)


class Splitter:
    """Goes through a graph once, with so many parts for products: what it lacks is `count`."""

    def __init__(self, graph: Graph, count: int, rank: int, parts: Mapping[str, int], reasons: dict[str, str]) -> None:
        self.graph, self.count, self.decided, self.reasons = graph, count, parts, reasons
        self.names, self.log = Names(graph), Log()
        self.made = {value.name: equation for equation in walk(graph.equations) for value in equation.results}
        self.states: set[str] = {eq.result.name for eq in walk(graph.equations) if eq.op == "state"}
        self.emitted: dict[str, Equation] = {}
        self.held: dict[str, Held] = {value.name: Held(value) for value in graph.inputs}
        self.parts = Parts(self.made, self.names, rank, count, self._whole)
        self.out: list[Equation] = []
        self._into(self.out)

    def run(self) -> Graph:
        """The rank's graph."""
        self.block(self.graph.equations)
        outputs = tuple((name, self.gathered(value)) for name, value in self.graph.outputs)
        return replace(self.graph, equations=tuple(self.out), outputs=outputs)

    def block(self, equations: Sequence[Equation]) -> None:
        for equation in equations:
            if equation.body is not None:
                self.repeat(equation, equation.body)
            elif equation.op in ("weight", "const"):
                self.out.append(equation)
                self.held[equation.result.name] = Held(equation.result)
            elif equation.op != "state":  # in as many parts as its attention has of heads
                RULES.get(equation.op, whole)(self, equation)

    def repeat(self, equation: Equation, body: Block) -> None:
        """What a round gives the next, and what it reads from outside, is whole or split, and not a sum."""
        for value in used_values(equation):
            if value.name in self.held:
                self.settled(value)
        carried = tuple(self.all_of(value, "a round needs all of") for value in equation.values)
        outer, held, known = self.out, dict(self.held), dict(self.parts.known)
        self.held.update((value.name, Held(value)) for value in body.params)
        self._into([])
        self.block(body.equations)
        results = tuple(self.all_of(value, "the next round needs all of") for value in body.results)
        inner = tuple(self.out)
        self.held, self.parts.known = held, known
        self._into(outer)
        self.out.append(replace(equation, args=carried, body=Block(body.params, inner, results)))
        self.held.update((value.name, Held(value)) for value in equation.results)

    def _into(self, out: list[Equation]) -> None:
        self.out = self.parts.out = out

    # -- what rules do ------------------------------------------------------------------------------------------------

    def wanted(self, name: str) -> int:
        """In how many parts a product's output features are."""
        return self.decided.get(name, self.count)

    def stays(self, name: str, reason: str) -> None:
        """Note why a product is whole."""
        if not reason.endswith("is not decided by weights"):  # of two activations: nothing to tell
            self.reasons[name] = reason

    def settled(self, value: Value) -> Held:
        """What is held of a value, a sum added up: once, whoever reads it."""
        held = self.held[value.name]
        if isinstance(held.layout, Sum):
            total = self._added_up(held.value, beside(value.name, "sum"))
            ready = sorted(held.layout.plus, key=lambda other: other.type.rank)
            for number, other in enumerate(ready, 1):
                last = number == len(ready) and held.value.name != value.name
                args, equation = (total, other) if other.type.rank < total.type.rank else (other, total), None
                total = emit(self.out, self.names, "add", *args, to=beside(value.name, "sum"), where=self._where(value))
                if last:  # as in the whole graph
                    equation = replace(self.out.pop(), results=(replace(value, type=total.type),))
                    self.out.append(equation)
                    total = equation.result
            held = self.held[value.name] = Held(total)
        return held

    def _added_up(self, value: Value, to: str) -> Value:
        """The sum of what the ranks have; a view is taken behind it, where it is part of what comes next."""
        source = self.emitted.get(value.name)
        if source is None or source.op != "reshape":
            return self._exchange("all_reduce", value, to, {})
        return self.another(source, [self._exchange("all_reduce", source.values[0], to, {})])

    def _whole(self, value: Value) -> Value | None:
        held = self.settled(value)
        return held.value if held.layout is None else None

    def all_of(self, value: Value, why: str) -> Value:
        """A value that every rank has all of."""
        held = self.settled(value)
        if isinstance(held.layout, Split):
            raise MismatchError((held.layout,), f"{why} %{value.name}")
        return held.value

    def emit(
        self,
        equation: Equation,
        values: Sequence[Value],
        layout: Layout,
        attrs: Mapping[str, AttrValue] | None = None,
    ) -> None:
        """The operation on what this rank has in place of its values; the result keeps its name."""
        given = equation.attr if attrs is None else attrs
        args = _with_values(equation, values)
        (kind,) = REGISTRY[equation.op].infer_types(args, given)
        result = replace(equation.result, type=kind)
        self.emitted[result.name] = replace(equation, args=args, results=(result,), attrs=tuple(given.items()))
        self.out.append(self.emitted[result.name])
        self.held[result.name] = Held(result, layout)
        if isinstance(layout, Split) and layout.origins == {result.name}:
            self.log.hit("columns", result.name, equation.where)

    def another(self, equation: Equation, values: Sequence[Value]) -> Value:
        """The operation once more on other values."""
        args = _with_values(equation, values)
        name = equation.result.name
        return emit(self.out, self.names, equation.op, *args, to=name, where=equation.where, attrs=equation.attr)

    def state(self, value: Value, axis: int, parts: int) -> Value:
        """A buffer of so many parts, of which this rank has one."""
        equation, place = self.made[value.name], value.type.rank + axis
        shape = value.type.shape
        kind = replace(value.type, shape=(*shape[:place], int(str(shape[place])) // parts, *shape[place + 1 :]))
        result = replace(value, type=kind)
        self.out.append(replace(equation, results=(result,)))
        return result

    def gathered(self, value: Value) -> Value:
        """All parts of a value that is split along its last axis, one for each rank."""
        held = self.settled(value)
        if held.layout is None:
            return held.value
        if not isinstance(held.layout, Split) or held.layout.axis != -1 or held.layout.parts != self.count:
            splits = (held.layout,) if isinstance(held.layout, Split) else ()
            raise MismatchError(splits, f"no exchange gives all of %{value.name}")
        return self._exchange("all_gather", held.value, beside(value.name, "all"), {"axis": -1})

    def _exchange(self, op: str, value: Value, to: str, attrs: Mapping[str, AttrValue]) -> Value:
        where = self._where(value)
        found = emit(self.out, self.names, op, value, to=to, where=where, attrs={**attrs, "ranks": self.count})
        self.log.hit(op, found.name, where)
        return found

    def _where(self, value: Value) -> Where | None:
        return self.made[value.name].where if value.name in self.made else None


def _with_values(equation: Equation, values: Sequence[Value]) -> tuple[Arg, ...]:
    ready = iter(values)
    return tuple(next(ready) if isinstance(arg, Value) else arg for arg in equation.args)
