"""What can be checked of a spec's wiring: names, uses, arities, and that every value is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from specs.equations import (
    FUNCTIONS,
    INPUTS,
    LAYER,
    OUTPUTS,
    Call,
    Constant,
    Equation,
    IfExp,
    Name,
    Repeat,
    Value,
    children,
    equations,
    walk,
)
from specs.errors import SpecRTError, Where
from specs.expressions import Expr
from specs.names import did_you_mean
from specs.schema import Spec


def calls(steps: Iterable[Equation]) -> Iterator[Call]:
    """Every call in equations, outermost first."""
    for step in steps:
        yield from (node for node in walk(step.value) if isinstance(node, Call))


def layered_parts(spec: Spec) -> set[str]:
    """The parts used inside `repeat`: they have one set of weights per layer."""
    return {
        call.func
        for step in spec.graph
        if isinstance(step, Repeat)
        for call in calls(step.body)
        if call.func in spec.parts
    }


def undefined(name: str, where: Where, known: Iterable[str]) -> SpecRTError:
    """The error of a name that is not known, with the nearest."""
    return SpecRTError("SPEC-011", f"`{name}` is not defined", where=where, hint=did_you_mean(name, known))


def check_names(spec: Spec, expr: Expr, extra: Iterable[str] = ()) -> None:
    """Every name in an expression is one of `config`, or of `extra`; raises SPEC-011."""
    known = {*spec.config, *extra}
    for name in sorted(expr.names()):
        if name.split(".")[0] not in known:
            raise undefined(name, expr.where, known)


def check_graph(spec: Spec) -> None:
    """Names, arities and outputs of the wiring, and that nothing in it is computed in vain; raises SPEC-0xx."""
    tensors = set(INPUTS)
    branches: dict[str, set[str]] = {}  # what is known under each condition
    for step in spec.graph:
        if isinstance(step, Repeat):
            check_names(spec, step.count)
            inner = set(tensors)
            for equation in step.body:
                _check_equation(spec, equation, inner, (LAYER,))
        elif step.when is not None:
            check_names(spec, step.when)
            known = branches.setdefault(step.when.text, set())
            known |= tensors
            _check_equation(spec, step, known, ())
        else:
            _check_equation(spec, step, tensors, ())
    if not spec.outputs:
        raise SpecRTError(
            "SPEC-023",
            "the graph has no output",
            where=spec.key_where("graph"),
            hint="name the result one of: " + ", ".join(f"`{name}`" for name in OUTPUTS),
        )
    _check_live(spec)


def _check_equation(spec: Spec, equation: Equation, tensors: set[str], extra: tuple[str, ...]) -> None:
    for node in walk(equation.value):
        if isinstance(node, Constant):
            known = {*tensors, *spec.config, *extra}
            for name in sorted(node.expr.names()):
                if name.split(".")[0] not in {*spec.config, *extra}:
                    raise undefined(name, node.where, known)
        elif isinstance(node, IfExp):
            check_names(spec, node.test, extra)
        elif isinstance(node, Name) and node.id not in tensors:
            raise undefined(node.id, node.where, {*tensors, *spec.config, *extra})
        elif isinstance(node, Call):
            part = spec.parts.get(node.func)
            expected = part.inputs if part else FUNCTIONS[node.func]
            if len(node.args) != expected:
                what = "part" if part else "function"
                raise SpecRTError(
                    "SPEC-024",
                    f"{what} `{node.func}` takes {_count(expected, 'value')}, got {len(node.args)}",
                    where=node.where,
                )
    given = _results(spec, equation.value)
    if len(equation.targets) != given:
        raise SpecRTError(
            "SPEC-024",
            f"the right side gives {_count(given, 'value')}, the left side names {len(equation.targets)}",
            where=equation.where,
        )
    for target in equation.targets:
        if target in spec.config or target in spec.parts:
            what = "config name" if target in spec.config else "part"
            raise SpecRTError("SPEC-021", f"`{target}` is a {what} and cannot be assigned", where=equation.where)
    tensors.update(equation.targets)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _results(spec: Spec, value: Value) -> int:
    part = spec.parts.get(value.func) if isinstance(value, Call) else None
    return part.outputs if part else 1


def _check_live(spec: Spec) -> None:
    """Every assigned value is read later, or is an output. A loop's body is followed twice: what the next
    layer reads counts.
    """
    order: list[Equation] = []
    for step in spec.graph:
        order += [*step.body, *step.body] if isinstance(step, Repeat) else [step]
    live: dict[str, tuple[Equation, ...]] = {}
    read: set[tuple[int, str]] = set()
    for equation in order:
        for node in walk(equation.value):
            if isinstance(node, Name):
                read |= {(id(source), node.id) for source in live.get(node.id, ())}
        for target in equation.targets:
            live[target] = (equation,)
    for equation in order:
        for target in equation.targets:
            if target not in OUTPUTS and (id(equation), target) not in read:
                raise SpecRTError(
                    "SPEC-025",
                    f"value `{target}` is never used",
                    where=equation.where,
                    hint="remove the equation, or use its result; outputs are "
                    + ", ".join(f"`{name}`" for name in OUTPUTS),
                )


def check_uses(spec: Spec) -> None:
    """Each part is called exactly once, under each condition; raises SPEC-018."""
    branches: dict[str | None, Counter[str]] = {}
    for equation in equations(spec.graph):
        key = None if equation.when is None else equation.when.text
        branches[key] = branches.get(key, Counter()) + _uses(equation.value)
    counts = branches.pop(None, Counter())
    alternatives: Counter[str] = Counter()
    for uses in branches.values():
        alternatives |= uses
    counts += alternatives
    for name in spec.parts:
        count = counts[name]
        if count == 0:
            raise SpecRTError(
                "SPEC-018",
                f"part `{name}` is used 0 times in `graph`, expected 1",
                where=spec.key_where("parts", name),
                hint=f"remove `{name}`, or call it: `x = {name}(x)`",
            )
        if count > 1:
            raise SpecRTError(
                "SPEC-018",
                f"part `{name}` is used {count} times in `graph`, expected 1",
                where=spec.key_where("parts", name),
                hint=f"if the model computes it once, reuse its result: `h = {name}(x)`",
            )


def _uses(value: Value) -> Counter[str]:
    """How often each part is called; of a condition's two sides, one of which is built, the one that calls it more."""
    if isinstance(value, IfExp):
        return _uses(value.body) | _uses(value.orelse)
    own = Counter([value.func] if isinstance(value, Call) else [])
    return sum((_uses(child) for child in children(value)), own)
