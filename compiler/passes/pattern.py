"""Matches a pattern, a few equations of IR text, against the equations of a block.

A pattern's values bind to the graph's values, `$holes` to attributes and literals, dims of typed results to dims.
Matching starts at one equation and goes both ways: back to the definitions of operands, also outside of `repeat`, and
on to the users of results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from inspect import Parameter

from compiler.ir.core import Arg, AttrValue, Equation, Value, used_values
from compiler.ir.ops import REGISTRY
from compiler.ir.parser import UNTYPED, Hole, parse_pattern
from compiler.ir.printer import print_literal
from compiler.ir.types import TensorType

# compare(a, b) {kind} says the same as compare(b, a) {mirrored kind}.
_MIRROR = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}


class Scope:
    """The equations of one block, with who defines and who uses each value; `outer` are definitions around it."""

    def __init__(
        self, equations: tuple[Equation, ...], results: tuple[Value, ...], outer: Mapping[str, Equation] | None = None
    ) -> None:
        self.equations, self.results = equations, results
        self.definitions: dict[str, Equation] = dict(outer or {})
        self.position: dict[str, int] = {}
        self.users: dict[str, list[Equation]] = {}
        self.yielded = {value.name for value in results}
        for index, equation in enumerate(equations):
            for value in equation.results:
                self.definitions[value.name] = equation
                self.position[value.name] = index
            for name in {value.name for value in used_values(equation)}:
                self.users.setdefault(name, []).append(equation)

    def definition(self, arg: Arg) -> Equation | None:
        """The equation that defines an operand; None for inputs, parameters of a body and literals."""
        return self.definitions.get(arg.name) if isinstance(arg, Value) else None

    def owns(self, equation: Equation) -> bool:
        """Whether an equation is in this block itself, not around it."""
        return equation.results[0].name in self.position


@dataclass(frozen=True)
class Pattern:
    """Parsed pattern text."""

    equations: tuple[Equation, ...]
    by_result: Mapping[str, Equation]

    @property
    def last(self) -> str:
        return self.equations[-1].results[0].name


@cache
def read_pattern(text: str) -> Pattern:
    """The pattern that `text` writes; raises SpecRTError IR-001."""
    equations = parse_pattern(text)
    return Pattern(equations, {value.name: equation for equation in equations for value in equation.results})


def named(name: str) -> Value:
    """A pattern's `%name`."""
    return Value(name, UNTYPED)


@dataclass
class Match:
    """What the names of a pattern stand for in the graph."""

    scope: Scope
    values: dict[str, Arg] = field(default_factory=dict)
    holes: dict[str, AttrValue] = field(default_factory=dict)
    equations: dict[str, Equation] = field(default_factory=dict)  # by the pattern's name of its first result

    def value(self, name: str) -> Value:
        """The value that `%name` is bound to."""
        value = self.values[name]
        if not isinstance(value, Value):
            raise TypeError(f"%{name} is bound to {value}")
        return value

    def type(self, name: str) -> TensorType:
        """The type of the value that `%name` is bound to."""
        return self.value(name).type

    def find(self, text: str, value: Arg) -> Match | None:
        """The match of another pattern whose last equation defines `value`; what it matches is not consumed."""
        pattern = read_pattern(text)
        search = Search(pattern, self.scope)
        return search.match if search.start(((named(pattern.last), value),)) else None


@dataclass(frozen=True)
class Miss:
    """How far a match got (in equations) and what stopped it."""

    depth: int
    reason: str


# A pattern's operand, which may be a hole, and the operand of the graph that it must match.
Goal = tuple[object, Arg]
Goals = tuple[Goal, ...]


class Search:
    """A depth-first search with backtracking; `miss` is the deepest failure."""

    def __init__(self, pattern: Pattern, scope: Scope) -> None:
        self.pattern, self.scope = pattern, scope
        self.match = Match(scope)
        self.miss: Miss | None = None
        self._trail: list[tuple[dict[str, object], str]] = []

    def start(self, goals: Goals) -> bool:
        """Search from pairs of pattern operands and graph operands."""
        return self._solve(goals)

    # -- bindings ----------------------------------------------------------------------------------------------

    def _set(self, table: dict[str, object], name: str, value: object) -> bool:
        if name in table:
            return _same(table[name], value)
        table[name] = value
        self._trail.append((table, name))
        return True

    def _undo(self, mark: int) -> None:
        while len(self._trail) > mark:
            table, name = self._trail.pop()
            del table[name]

    def _fail(self, reason: str) -> bool:
        depth = len(self.match.equations)
        if self.miss is None or depth > self.miss.depth:
            self.miss = Miss(depth, reason)
        return False

    # -- search ------------------------------------------------------------------------------------------------

    def _solve(self, goals: Goals) -> bool:
        if not goals:
            return self._forward()
        (wanted, got), rest = goals[0], goals[1:]
        mark = len(self._trail)
        if isinstance(wanted, Value) and wanted.name not in self.match.values and wanted.name in self.pattern.by_result:
            target = self.pattern.by_result[wanted.name]
            found = self.scope.definition(got)
            if found is None or found.op != target.op:
                got_text = print_literal(got) if found is None else show(found)
                return self._fail(f"{got_text} where the rule has {show(target)}")
            return self._unify(target, found, rest)
        if self._bind(wanted, got) and self._solve(rest):
            return True
        self._undo(mark)
        return self._fail(f"{_operand(got)} where the rule has {self._wanted(wanted)}")

    def _wanted(self, wanted: object) -> str:
        bound = self.match.values.get(wanted.name) if isinstance(wanted, Value) else None
        return _operand(wanted) if bound is None else f"{_operand(bound)} (its {wanted})"

    def _bind(self, wanted: object, got: Arg) -> bool:
        match = self.match
        if isinstance(wanted, Hole):
            literal = got is not None and not isinstance(got, Value)
            return literal and self._set(match.holes, wanted.name, got)  # type: ignore[arg-type]
        if isinstance(wanted, Value):
            known = wanted.name in match.values
            if not known and got is not None and not isinstance(got, Value):
                return False
            return self._set(match.values, wanted.name, got)  # type: ignore[arg-type]
        return _same(wanted, got)

    def _forward(self) -> bool:
        """All operands are matched; go on from what is bound to an equation of the pattern that is not."""
        values, matched = self.match.values, self.match.equations
        left = [target for target in self.pattern.equations if target.results[0].name not in matched]
        if not left:
            return True
        for inner in (True, False):  # first through results of the pattern, which have few users, then its free values
            for target in left:
                for arg in target.values:
                    if arg.name in values and (arg.name in self.pattern.by_result) == inner:
                        return self._forward_from(target, values[arg.name])
        raise ValueError(f"the pattern is not connected at {show(left[0])}")

    def _forward_from(self, target: Equation, bound: Arg) -> bool:
        taken = [id(equation) for equation in self.match.equations.values()]
        users = self.scope.users.get(bound.name, ()) if isinstance(bound, Value) else ()
        for user in users:
            if user.op == target.op and id(user) not in taken and self._unify(target, user, ()):
                return True
        others = ", ".join(sorted({user.op for user in users})) or "nothing"
        return self._fail(f"{print_literal(bound)} is used by {others} where the rule has {show(target)}")

    def _unify(self, target: Equation, found: Equation, rest: Goals) -> bool:
        mark = len(self._trail)
        table: dict[str, object] = self.match.equations  # type: ignore[assignment]
        for args, attrs in _orders(found):
            if (
                self._results(target, found)
                and self._attributes(target, attrs)
                and self._set(table, target.results[0].name, found)
            ):
                # Operands that the pattern defines come first: they fail early.
                pairs = _pairs(target, args)
                pairs.sort(key=lambda pair: not (isinstance(pair[0], Value) and pair[0].name in self.pattern.by_result))
                if self._solve((*pairs, *rest)):
                    return True
            else:
                self._fail(f"{show(found)} where the rule has {show(target)}")
            self._undo(mark)
        return False

    def _results(self, target: Equation, found: Equation) -> bool:
        if len(target.results) != len(found.results):
            return False
        for wanted, got in zip(target.results, found.results, strict=True):
            if not self._set(self.match.values, wanted.name, got):  # type: ignore[arg-type]
                return False
            if wanted.type != UNTYPED and not self._type(wanted.type, got.type):
                return False
        return True

    def _type(self, wanted: TensorType, got: TensorType) -> bool:
        if wanted.dtype not in ("any", got.dtype) or wanted.rank != got.rank:
            return False
        for want, dim in zip(wanted.shape, got.shape, strict=True):
            if isinstance(want, str):
                if not self._set(self.match.holes, want, dim):  # type: ignore[arg-type]
                    return False
            elif want != dim:
                return False
        return True

    def _attributes(self, target: Equation, attrs: Mapping[str, AttrValue]) -> bool:
        wanted = target.attr
        for attribute in REGISTRY[target.op].attributes:
            if attribute.name in wanted:
                if attribute.name not in attrs and attribute.default is Parameter.empty:
                    return False
                got = attrs.get(attribute.name, attribute.default)
                if not self._attribute(wanted[attribute.name], got):
                    return False
                continue
            # An option that the pattern does not name must be off; a required attribute may be anything.
            option = attribute.default is not Parameter.empty and attribute.name in attrs
            if option and not _same(attrs[attribute.name], attribute.default):
                return False
        return True

    def _attribute(self, wanted: object, got: object) -> bool:
        if isinstance(wanted, Hole):
            return self._set(self.match.holes, wanted.name, got)  # type: ignore[arg-type]
        if isinstance(wanted, tuple):
            return (
                isinstance(got, tuple)
                and len(wanted) == len(got)
                and all(self._attribute(want, item) for want, item in zip(wanted, got, strict=True))
            )
        return _same(wanted, got)


def _orders(found: Equation) -> Iterator[tuple[tuple[Arg, ...], Mapping[str, AttrValue]]]:
    """The ways to read an equation: operands of a commutative operation also swapped, comparisons also mirrored."""
    yield found.args, found.attr
    if found.op == "compare":
        yield found.args[::-1], {"kind": _MIRROR[str(found.attr["kind"])]}
    elif REGISTRY[found.op].commutative and found.args[0] != found.args[1]:
        yield found.args[::-1], found.attr


def _pairs(target: Equation, args: tuple[Arg, ...]) -> list[Goal]:
    size = max(len(target.args), len(args))
    wanted = target.args + (None,) * (size - len(target.args))
    return list(zip(wanted, args + (None,) * (size - len(args)), strict=True))


def _same(left: object, right: object) -> bool:
    """Equality that keeps true apart from 1, and finds 1 equal to 1.0 and nan to itself."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    return left == right or (left != left and right != right)


def show(equation: Equation) -> str:
    """`%result = op(operands) {attributes}`, for messages."""
    results = ", ".join(str(value) for value in equation.results)
    text = f"{results} = {equation.op}({', '.join(_operand(arg) for arg in equation.args)})"
    if equation.attrs:
        text += " {" + ", ".join(f"{name} = {_operand(value)}" for name, value in equation.attrs) + "}"
    return f"`{text}`" if len(text) <= 120 else f"`{text[:117]}...`"


def _operand(arg: object) -> str:
    if isinstance(arg, Hole):
        return f"${arg.name}"
    if isinstance(arg, tuple):
        return "(" + ", ".join(_operand(item) for item in arg) + ")"
    return "_" if arg is None else print_literal(arg)  # type: ignore[arg-type]
