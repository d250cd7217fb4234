"""The verifier: numbered constraints that hold for every graph between any two passes.

C1  A value is defined before it is used, in its block or one around it.
C2  A value's name is unique in the graph.
C3  A result has the type that the operation's rule infers.
C4  An operation is known, and its operands and attributes are those of its signature.
C5  The body of `repeat` has one parameter and one result for each carried value, all of one type; bodies do not nest.
C6  A symbolic dim is declared once, with 1 <= lo <= opt <= hi; every dim used is declared, or a number from 1.
C7  A weight or state name has `{i}` inside `repeat` and only there, and one type in the graph.
C8  Outputs are defined at the top level and have unique names.
C9  Only `repeat` has a body.
"""

from __future__ import annotations

from collections.abc import Sequence

from compiler.ir.core import Equation, Graph, Value
from compiler.ir.names import is_template
from compiler.ir.ops import REGISTRY, TypeRuleError
from compiler.ir.types import TensorType
from specs.errors import SpecRTError, Where


def verify(graph: Graph, after: str | None = None) -> None:
    """Check C1 to C9; raises SpecRTError IR-003 naming the constraint (and the pass `after` which it broke)."""
    _Verifier(graph, after).run()


class _Verifier:
    def __init__(self, graph: Graph, after: str | None) -> None:
        self.graph, self.after = graph, after
        self.names: set[str] = set()
        self.stored: dict[str, TensorType] = {}
        self.dims = {sym.name for sym in graph.dims}

    def fail(self, constraint: str, message: str, where: Where | None = None) -> SpecRTError:
        source = f" after {self.after}" if self.after else ""
        text = f"{constraint} broken in graph `{self.graph.name}`{source}: {message}"
        return SpecRTError("IR-003", text, where=where)

    def run(self) -> None:
        names = [sym.name for sym in self.graph.dims]
        for sym in self.graph.dims:
            if names.count(sym.name) > 1:
                raise self.fail("C6", f"dim `{sym.name}` is declared twice")
            if not 1 <= sym.lo <= sym.opt <= sym.hi:
                raise self.fail("C6", f"dim `{sym}` must have 1 <= lo <= opt <= hi")
        scope: dict[str, TensorType] = {}
        for value in self.graph.inputs:
            self.define(value, scope, None)
        self.block(self.graph.equations, scope, inside=False)
        outputs = [name for name, _ in self.graph.outputs]
        for name, value in self.graph.outputs:
            if outputs.count(name) > 1:
                raise self.fail("C8", f"output `{name}` occurs twice")
            if scope.get(value.name) != value.type:
                raise self.fail("C8", f"output `{name}` is {value}, which is not defined as {value.type}")

    def define(self, value: Value, scope: dict[str, TensorType], where: Where | None) -> None:
        if value.name in self.names:
            raise self.fail("C2", f"`{value}` is defined twice", where)
        self.names.add(value.name)
        for dim in value.type.shape:
            if isinstance(dim, str) and dim not in self.dims:
                raise self.fail("C6", f"`{value}` has the undeclared dim `{dim}`", where)
            if isinstance(dim, int) and dim < 1:
                raise self.fail("C6", f"`{value}` is {value.type}: a dim is 1 or more", where)
        scope[value.name] = value.type

    def block(self, equations: Sequence[Equation], scope: dict[str, TensorType], *, inside: bool) -> None:
        for equation in equations:
            for value in equation.values:
                self.use(value, scope, equation.where)
            self.check(equation, scope, inside=inside)
            for value in equation.results:
                self.define(value, scope, equation.where)

    def use(self, value: Value, scope: dict[str, TensorType], where: Where | None) -> None:
        if value.name not in scope:
            raise self.fail("C1", f"`{value}` is used before it is defined", where)
        if scope[value.name] != value.type:
            raise self.fail("C3", f"`{value}` is used as {value.type} but defined as {scope[value.name]}", where)

    def check(self, equation: Equation, scope: dict[str, TensorType], *, inside: bool) -> None:
        where = equation.where
        if not equation.results:
            raise self.fail("C4", f"`{equation.op}` without a result", where)
        definition = REGISTRY.get(equation.op)
        if definition is None:
            raise self.fail("C4", f"unknown operation `{equation.op}`", where)
        try:
            types = definition.infer_types(equation.args, equation.attr, equation.results[0].type)
        except TypeRuleError as error:
            raise self.fail("C4", f"`{equation.results[0]}` = {equation.op}: {error}", where) from error
        got = tuple(value.type for value in equation.results)
        if types != got:
            text = f"{equation.op} infers {', '.join(map(str, types))}, the equation says {', '.join(map(str, got))}"
            raise self.fail("C3", text, where)
        if equation.op in ("weight", "state"):
            self.stored_name(equation, inside=inside)
        if (equation.op == "repeat") != (equation.body is not None):
            raise self.fail("C9", f"`{equation.op}` {'lacks its' if equation.op == 'repeat' else 'has a'} body", where)
        if equation.body is not None:
            self.body(equation, scope, inside=inside)

    def stored_name(self, equation: Equation, *, inside: bool) -> None:
        name = str(equation.attr["name"])
        if is_template(name) != inside:
            place = "inside" if inside else "outside of"
            raise self.fail("C7", f"`{name}` {place} `repeat`", equation.where)
        if self.stored.setdefault(name, equation.result.type) != equation.result.type:
            text = f"`{name}` is {equation.result.type} and elsewhere {self.stored[name]}"
            raise self.fail("C7", text, equation.where)

    def body(self, equation: Equation, scope: dict[str, TensorType], *, inside: bool) -> None:
        body = equation.body
        assert body is not None
        if inside:
            raise self.fail("C5", "`repeat` inside `repeat`", equation.where)
        carried = tuple(value.type for value in equation.values)
        params = tuple(value.type for value in body.params)
        results = tuple(value.type for value in body.results)
        if not carried == params == results:
            shown = "; ".join(", ".join(map(str, types)) for types in (carried, params, results))
            raise self.fail("C5", f"carried, parameter and result types differ: {shown}", equation.where)
        inner = dict(scope)
        for value in body.params:
            self.define(value, inner, equation.where)
        self.block(body.equations, inner, inside=True)
        for value in body.results:
            self.use(value, inner, equation.where)
