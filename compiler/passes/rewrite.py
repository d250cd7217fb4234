"""Applies rules to graphs. A rule is IR text on both sides and a function that may refuse.

The right side redefines some values of the left side (same `%name` in both texts): those keep their names in the
graph. All other equations of the left side go, so nothing else may use their results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from inspect import Parameter

from compiler.ir.core import Arg, AttrValue, Block, Equation, Graph, Value, eliminate_dead, used_values, walk
from compiler.ir.ops import REGISTRY, TypeRuleError
from compiler.ir.parser import Hole
from compiler.ir.types import TensorType
from compiler.passes.pattern import Match, Miss, Pattern, Scope, Search, named, read_pattern
from compiler.passes.runner import Log
from specs.errors import Where


@dataclass(frozen=True)
class Seed:
    """Where a rule with several roots starts: values of its names, or the reason why it can't apply `at` one."""

    at: Value
    where: Where | None
    values: Mapping[str, Value]
    reason: str | None = None


def always(equation: Equation, miss: Miss) -> bool:  # noqa: ARG001 -- the signature of `explain`
    """Explain every equation of the anchor's operation."""
    return True


def _never(match: Match) -> str | None:  # noqa: ARG001 -- the signature of `refuse`
    return None


@dataclass(frozen=True)
class Rule:
    """`before` -> `after`; alternatives of `before` are tried in order.

    Matching starts at the equation that defines `anchor` (default: the last), or at `seeds`. `refuse` gives the reason
    not to apply, or None, and may bind holes and values for the right side. Every equation of the anchor's operation
    that no rule of the pass consumed is reported with what stopped the match, if it is one to `explain`.
    """

    name: str
    before: str | tuple[str, ...]
    after: str
    anchor: str | None = None
    refuse: Callable[[Match], str | None] = _never
    explain: Callable[[Equation, Miss], bool] | None = None
    seeds: Callable[[Scope], Iterable[Seed]] | None = None

    @property
    def alternatives(self) -> tuple[str, ...]:
        return (self.before,) if isinstance(self.before, str) else self.before


@dataclass
class _Refused:
    rule: str
    where: Where | None
    miss: Miss


# A refusal of a complete match says more than any incomplete match.
_COMPLETE = 1_000_000


def rewrite(graph: Graph, rules: Iterable[Rule], log: Log) -> Graph:
    """The graph with every rule applied wherever it fits, without the equations that this leaves unused."""
    return _Rewriter(graph, tuple(rules), log).run()


class Names:
    """Value names of a graph; `unique` gives new ones."""

    def __init__(self, graph: Graph) -> None:
        self.taken = {value.name for value in graph.inputs}
        for equation in walk(graph.equations):
            self.taken.update(value.name for value in equation.results)
            if equation.body is not None:
                self.taken.update(value.name for value in equation.body.params)

    def unique(self, hint: str) -> str:
        """A name near `hint` that nothing has."""
        name, number = hint, 1
        while name in self.taken:
            number += 1
            name = f"{hint}.{number}"
        self.taken.add(name)
        return name


def emit(
    out: list[Equation],
    names: Names,
    op: str,
    *args: Arg,
    to: str,
    where: Where | None,
    kind: TensorType | None = None,
    attrs: Mapping[str, AttrValue] | None = None,
) -> Value:
    """Append an equation of one result, called `to` or near it; its type is what the operation's rule says."""
    given = attrs or {}
    (found,) = REGISTRY[op].infer_types(args, given, kind)
    value = Value(names.unique(to), found)
    out.append(Equation(op, args, (value,), tuple(given.items()), None, where))
    return value


class _Rewriter:
    def __init__(self, graph: Graph, rules: tuple[Rule, ...], log: Log) -> None:
        self.graph, self.rules, self.log = graph, rules, log
        self.names = Names(graph)
        self.refused: dict[str, _Refused] = {}  # by the value at which a rule was tried
        self.settled: set[str] = set()  # values that a rule consumed: why others did not does not matter

    def run(self) -> Graph:
        hits = len(self.log.hits)
        outputs = tuple(value for _, value in self.graph.outputs)
        graph = self.graph.with_equations(self.block(self.graph.equations, outputs, {}))
        for at, refused in self.refused.items():
            if at in self.settled:
                continue
            self.log.refuse(refused.rule, at, refused.where, refused.miss.reason)
        return remove_dead(graph) if len(self.log.hits) > hits else graph

    def block(
        self, equations: tuple[Equation, ...], results: tuple[Value, ...], outer: Mapping[str, Equation]
    ) -> tuple[Equation, ...]:
        scope = Scope(equations, results, outer)
        for rule in self.rules:
            again = True
            while again:
                changed = self.sweep(rule, scope)
                again = changed is not None
                if changed is not None:
                    scope = Scope(changed, results, outer)
        return tuple(
            equation if equation.body is None else replace(equation, body=self.body(equation.body, scope.definitions))
            for equation in scope.equations
        )

    def body(self, body: Block, outer: Mapping[str, Equation]) -> Block:
        return replace(body, equations=self.block(body.equations, body.results, outer))

    # -- one rule over one block -------------------------------------------------------------------------------

    def sweep(self, rule: Rule, scope: Scope) -> tuple[Equation, ...] | None:
        """The block's equations after every match that shares nothing with another; None where there is none."""
        gone: set[str] = set()  # first results of consumed equations
        new: dict[int, list[Equation]] = {}  # by the position where they go
        several = False
        for seed in self.starts(rule, scope):
            if any(value.name in gone for value in seed.values.values()):
                continue
            done = self.attempt(rule, scope, seed, gone)
            if done is None:
                continue
            consumed, equations, roots = done
            gone.update(equation.results[0].name for equation in consumed)
            first = min(scope.position[name] for name in roots)
            several = several or len(roots) > 1
            new.setdefault(first, []).extend(equations)
            for equation in consumed:
                self.settled.update(value.name for value in equation.results)
            self.settled.add(seed.at.name)
            self.log.hit(rule.name, roots[-1], equations[-1].where)
        if not new:
            return None
        out: list[Equation] = []
        for index, equation in enumerate(scope.equations):
            out += new.get(index, ())
            if equation.results[0].name not in gone:
                out.append(equation)
        return schedule(tuple(out)) if several else tuple(out)

    def starts(self, rule: Rule, scope: Scope) -> Iterator[Seed]:
        if rule.seeds is not None:
            yield from rule.seeds(scope)
            return
        patterns = [read_pattern(text) for text in rule.alternatives]
        anchor = rule.anchor or patterns[0].last
        op = patterns[0].by_result[anchor].op
        for equation in scope.equations:
            if equation.op == op:
                yield Seed(equation.results[0], equation.where, {anchor: equation.results[0]})

    def attempt(
        self, rule: Rule, scope: Scope, seed: Seed, gone: set[str]
    ) -> tuple[list[Equation], list[Equation], list[str]] | None:
        if seed.reason is not None:
            self.refuse(rule, seed, Miss(_COMPLETE, seed.reason))
            return None
        for text in rule.alternatives:
            pattern = read_pattern(text)
            if any(name not in pattern.by_result for name in seed.values):
                continue
            search = Search(pattern, scope)
            if not search.start(tuple((named(name), value) for name, value in seed.values.items())):
                miss, defined = search.miss, scope.definition(seed.at)
                if rule.explain and miss is not None and defined is not None and rule.explain(defined, miss):
                    self.refuse(rule, seed, miss)
                continue
            match = search.match
            reason, done = self.complete(rule, pattern, match, gone)
            if reason is None:
                return done
            if reason:
                self.refuse(rule, seed, Miss(_COMPLETE + len(match.equations), reason))
        return None

    def complete(
        self, rule: Rule, pattern: Pattern, match: Match, gone: set[str]
    ) -> tuple[str | None, tuple[list[Equation], list[Equation], list[str]] | None]:
        """The equations that go and those that come, or a reason (empty: try again in the next sweep)."""
        scope = match.scope
        after = read_pattern(rule.after)
        consumed = [equation for equation in match.equations.values() if scope.owns(equation)]
        if any(equation.results[0].name in gone for equation in consumed):
            return "", None
        inside = {id(equation) for equation in consumed}
        roots: list[str] = []
        for name in pattern.by_result:
            value = match.value(name)
            if value.name not in scope.position:
                continue
            if name in after.by_result:
                roots.append(value.name)
                continue
            users = [user for user in scope.users.get(value.name, ()) if id(user) not in inside]
            if users or value.name in scope.yielded:
                what = f"`{users[0].op}` (%{users[0].results[0].name})" if users else "the block's results"
                return f"%{value.name} is used elsewhere, by {what}", None
        reason = rule.refuse(match)
        if reason is not None:
            return reason, None
        try:
            equations = self.instantiate(after, match, pattern)
        except TypeRuleError as error:
            return str(error), None
        return None, (consumed, equations, sorted(roots, key=scope.position.__getitem__))

    def refuse(self, rule: Rule, seed: Seed, miss: Miss) -> None:
        known = self.refused.get(seed.at.name)
        if known is None or miss.depth >= known.miss.depth:
            self.refused[seed.at.name] = _Refused(rule.name, seed.where, miss)

    # -- the right side ----------------------------------------------------------------------------------------

    def instantiate(self, after: Pattern, match: Match, before: Pattern) -> list[Equation]:
        """The right side in the graph's values; raises TypeRuleError where types are refused or a root's changes."""
        values: dict[str, Arg] = dict(match.values)
        for name in before.by_result:
            values.pop(name, None)
        root = next(match.value(name).name for name in before.by_result if name in after.by_result)
        fallback = next((e.where for e in reversed(list(match.equations.values())) if e.where is not None), None)
        equations: list[Equation] = []
        for target in after.equations:
            args = tuple(_resolve(arg, values, match.holes) for arg in target.args)
            while args and args[-1] is None:
                args = args[:-1]
            attrs = instantiate_attributes(target, match.holes)
            types = REGISTRY[target.op].infer_types(args, dict(attrs), None)
            results = []
            for wanted, kind in zip(target.results, types, strict=True):
                old = match.values.get(wanted.name) if wanted.name in before.by_result else None
                if isinstance(old, Value):
                    if old.type != kind:
                        raise TypeRuleError(f"%{old.name} would change from {old.type} to {kind}")
                    value = old
                else:
                    value = Value(self.names.unique(beside(root, wanted.name)), kind)
                values[wanted.name] = value
                results.append(value)
            replaced = match.equations.get(target.results[0].name)
            where = fallback if replaced is None or replaced.where is None else replaced.where
            equations.append(Equation(target.op, args, tuple(results), attrs, None, where))
        return equations


def _resolve(arg: object, values: Mapping[str, Arg], holes: Mapping[str, AttrValue]) -> Arg:
    if isinstance(arg, Hole):
        value = holes[arg.name]
        if isinstance(value, (str, tuple)):
            raise TypeError(f"${arg.name} is {value!r} and can't be an operand")
        return value
    return values[arg.name] if isinstance(arg, Value) else arg  # type: ignore[return-value]


def _literal(value: object, holes: Mapping[str, AttrValue]) -> AttrValue:
    if isinstance(value, Hole):
        return holes[value.name]
    if isinstance(value, tuple):
        return tuple(_literal(item, holes) for item in value)
    return value  # type: ignore[return-value]  # a hole or an attribute


def instantiate_attributes(target: Equation, holes: Mapping[str, AttrValue]) -> tuple[tuple[str, AttrValue], ...]:
    """The attributes with holes filled; those that have their default are left out."""
    defaults = {attribute.name: attribute.default for attribute in REGISTRY[target.op].attributes}
    filled = ((name, _literal(value, holes)) for name, value in target.attrs)
    return tuple(
        (name, value) for name, value in filled if defaults[name] is Parameter.empty or defaults[name] != value
    )


def beside(name: str, last: str) -> str:
    """`attn.joined`, `scores` -> `attn.scores`: a name for what belongs to another value."""
    stem = name.rstrip("0123456789").rstrip(".").rpartition(".")[0] if "." in name else name
    return f"{stem or name.partition('.')[0]}.{last}"


# -- blocks ---------------------------------------------------------------------------------------------------------


def remove_dead(graph: Graph) -> Graph:
    """The graph without equations whose results nothing uses; those with an effect stay."""
    return eliminate_dead(graph, lambda op: REGISTRY[op].effect)


def schedule(equations: tuple[Equation, ...]) -> tuple[Equation, ...]:
    """The equations of a block in an order that defines before use, moved as little as possible."""
    definitions = {value.name: equation for equation in equations for value in equation.results}
    out: list[Equation] = []
    placed: set[int] = set()

    def place(equation: Equation) -> None:
        if id(equation) in placed:
            return
        placed.add(id(equation))
        for value in used_values(equation):
            needed = definitions.get(value.name)
            if needed is not None and id(needed) not in placed:
                place(needed)
        out.append(equation)

    for equation in equations:
        place(equation)
    return tuple(out)
