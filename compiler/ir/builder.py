"""Builds equations in order, infers their types and keeps their names unique."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from compiler.ir.core import Arg, AttrValue, Block, Equation, Graph, Value
from compiler.ir.ops import REGISTRY, TypeRuleError
from compiler.ir.types import Sym, TensorType
from specs.errors import SpecRTError, Where


class Builder:
    """Collects the equations of one graph; `where` is the place given to those that follow."""

    def __init__(self, taken: Sequence[str] = ()) -> None:
        self.equations: list[Equation] = []
        self.where: Where | None = None
        self._taken = set(taken)
        self._outermost = self.equations

    def unique(self, hint: str) -> str:
        """A value name near `hint` that nothing else has."""
        name, number = hint, 1
        while name in self._taken:
            number += 1
            name = f"{hint}.{number}"
        self._taken.add(name)
        return name

    def input(self, name: str, dtype: str, *shape: int | str) -> Value:
        """A graph input (pass the collected ones to `graph`)."""
        return Value(self.unique(name), TensorType(dtype, shape))

    def emit(self, op: str, *args: Arg, to: str, type: TensorType | None = None, **attrs: AttrValue) -> Value:  # noqa: A002
        """Append `to = op(args) {attrs}` and give its result; `type` is for sources (weight, state, const).

        Raises SpecRTError IR-002 where the type rule refuses.
        """
        while args and args[-1] is None:
            args = args[:-1]
        try:
            (result,) = REGISTRY[op].infer_types(args, attrs, type)
        except TypeRuleError as error:
            raise SpecRTError("IR-002", f"`{to}` = {op}: {error}", where=self.where) from error
        value = Value(self.unique(to), result)
        self.equations.append(Equation(op, args, (value,), tuple(attrs.items()), None, self.where))
        return value

    def repeat(
        self, count: int, carried: Sequence[Value], names: Sequence[str], body: Callable[..., Sequence[Value]]
    ) -> tuple[Value, ...]:
        """Append a `repeat` whose body is built by `body(*params) -> results`; `names` are those of the carried."""
        place = self.where
        params = tuple(Value(self.unique(f"{name}.in"), value.type) for name, value in zip(names, carried, strict=True))
        with self._block() as equations:
            results = tuple(body(*params))
        self.where = place
        for param, result in zip(params, results, strict=True):
            if param.type != result.type:
                message = f"`{param}` is carried as {param.type} and comes back as {result.type}"
                raise SpecRTError("IR-002", message, where=place)
        outs = tuple(Value(self.unique(f"{name}.out"), value.type) for name, value in zip(names, carried, strict=True))
        block = Block(params, tuple(equations), results)
        self.equations.append(Equation("repeat", tuple(carried), outs, (("count", count),), block, place))
        return outs

    @contextmanager
    def _block(self) -> Iterator[list[Equation]]:
        outer, self.equations = self.equations, []
        try:
            yield self.equations
        finally:
            self.equations = outer

    @contextmanager
    def hoisted(self) -> Iterator[None]:
        """Emit before the `repeat` that is being built: for what every round shares (tables, masks)."""
        inner, self.equations = self.equations, self._outermost
        try:
            yield
        finally:
            self.equations = inner

    def graph(
        self, name: str, dims: Sequence[Sym], inputs: Sequence[Value], outputs: Sequence[tuple[str, Value]]
    ) -> Graph:
        """The graph of everything emitted."""
        return Graph(name, tuple(dims), tuple(inputs), tuple(self.equations), tuple(outputs))
