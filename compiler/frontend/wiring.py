"""The equations of `graph:` -> IR: values, part calls, and `repeat` folded into as few bodies as the layers allow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from compiler.frontend.attention import attention_part
from compiler.frontend.context import Context, Round
from compiler.frontend.latent import latent_attention_part
from compiler.frontend.moe import moe_part
from compiler.frontend.parts import (
    PartBuilder,
    embedding_part,
    gated_mlp_part,
    layer_norm_part,
    linear_part,
    mlp_part,
    rms_norm_part,
)
from compiler.ir import Value
from specs import equations as eq
from specs.errors import SpecRTError
from specs.expressions import Expr
from specs.schema import Spec

# The builder of each part kind; a test checks that the schema's kinds and these are the same.
PART_BUILDERS: dict[str, PartBuilder] = {
    "attention": attention_part,
    "embedding": embedding_part,
    "gated_mlp": gated_mlp_part,
    "latent_attention": latent_attention_part,
    "layer_norm": layer_norm_part,
    "linear": linear_part,
    "mlp": mlp_part,
    "moe": moe_part,
    "rms_norm": rms_norm_part,
}
_OPERATORS = {"+": "add", "-": "sub", "*": "mul", "/": "div"}
Scope = dict[str, Value]


def wire(ctx: Context, spec: Spec) -> Scope:
    """Emit the whole graph; gives every top-level name, the outputs among them."""
    scope: Scope = {"tokens": ctx.input("tokens", "i32", "B", "S")}
    first = 0
    for step in spec.graph:
        if isinstance(step, eq.Repeat):
            first += _repeat(ctx, spec, step, scope, first)
        elif step.when is None or step.when.as_bool(ctx.env):
            _equation(ctx, spec, step, scope)
    return scope


def _equation(ctx: Context, spec: Spec, step: eq.Equation, scope: Scope) -> None:
    with ctx.at(step.where):
        value = _value(ctx, spec, step.value, scope, step.targets[0])
    if not isinstance(value, Value):
        raise SpecRTError("SPEC-061", f"`{step.targets[0]}` is a number, not a tensor", where=step.where)
    scope[step.targets[0]] = value


def _value(ctx: Context, spec: Spec, node: eq.Value, scope: Scope, to: str) -> Value | float:
    if isinstance(node, eq.Name):
        return scope[node.id] if node.id in scope else _input(ctx, node.id)
    if isinstance(node, eq.Constant):
        return node.expr.as_float(ctx.env)
    if isinstance(node, eq.IfExp):
        chosen = node.body if node.test.as_bool(ctx.env) else node.orelse
        return _value(ctx, spec, chosen, scope, to)
    if isinstance(node, eq.BinOp):
        left, right = (_value(ctx, spec, side, scope, to) for side in (node.left, node.right))
        with ctx.at(node.where):
            return ctx.emit(_OPERATORS[node.op], left, right, to=to)
    args = [_value(ctx, spec, arg, scope, to) for arg in node.args]
    with ctx.at(node.where):
        if node.func not in spec.parts:
            return _FUNCTIONS.get(node.func, _elementwise)(ctx, node.func, *args, to=to)
        part = spec.parts[node.func]
        return PART_BUILDERS[part.kind_name()](ctx, node.func, part, *args)  # type: ignore[arg-type]  # arity: SPEC-0xx


def _elementwise(ctx: Context, name: str, x: Value, *, to: str) -> Value:
    return ctx.emit(name, x, to=to)


def _first(ctx: Context, name: str, x: Value, *, to: str) -> Value:
    """x [B,S,M] -> [B,M]: rows are padded behind their tokens, so each begins with its first."""
    one = ctx.emit("slice", x, to=f"{to}.{name}", axis=-2, start=0, stop=1)
    return ctx.emit("reshape", one, to=to, shape=(x.type.shape[0], x.type.shape[-1]))


def _squeeze(ctx: Context, _: str, x: Value, *, to: str) -> Value:
    return ctx.emit("reshape", x, to=to, shape=x.type.shape[:-1])


_FUNCTIONS: dict[str, Callable[..., Value]] = {"first": _first, "squeeze": _squeeze}


def _input(ctx: Context, name: str) -> Value:
    return ctx.input(name, "i32", "B", "S")


# -- repeat ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """`count` rounds of `period` layers each, from layer `start`."""

    start: int
    period: int
    count: int


def _repeat(ctx: Context, spec: Spec, step: eq.Repeat, scope: Scope, first: int) -> int:
    total = step.count.as_int(ctx.env)
    prefix = step.count.text if step.count.text.isidentifier() else "layers"
    choices = tuple(_choices(spec, step))
    signatures = [
        tuple(repr(expr.value({**ctx.env, "layer": first + layer})) for expr in choices) for layer in range(total)
    ]
    carried = [name for name in dict.fromkeys(t for line in step.body for t in line.targets) if name in scope]
    if not carried:
        raise SpecRTError("SPEC-062", "`repeat` changes no value that exists before it", where=step.where)
    for run in fold(signatures):
        with ctx.at(step.where):
            outs = ctx.builder.repeat(
                run.count,
                [scope[name] for name in carried],
                carried,
                lambda *params, run=run: _rounds(
                    ctx, spec, step, {**scope, **dict(zip(carried, params, strict=True))}, carried, prefix, first, run
                ),
            )
        scope.update(zip(carried, outs, strict=True))
    return total


def _rounds(
    ctx: Context, spec: Spec, step: eq.Repeat, scope: Scope, carried: Sequence[str], prefix: str, first: int, run: Run
) -> list[Value]:
    for offset in range(run.period):
        with ctx.in_round(Round(prefix, run.period, first + run.start + offset, run.count)):
            for line in step.body:
                _equation(ctx, spec, line, scope)
    return [scope[name] for name in carried]


def _choices(spec: Spec, step: eq.Repeat) -> Iterator[Expr]:
    """The expressions in a `repeat` that depend on the layer's number: what makes one layer differ from another."""
    parts: set[str] = set()
    for line in step.body:
        for node in eq.walk(line.value):
            if isinstance(node, eq.IfExp):
                yield node.test
            elif isinstance(node, eq.Constant) and "layer" in node.expr.names():
                yield node.expr
            elif isinstance(node, eq.Call) and node.func in spec.parts:
                parts.add(node.func)
    for name in sorted(parts):
        for _, expr, _ in spec.parts[name].expressions():
            if "layer" in expr.names():
                yield expr


def fold(signatures: Sequence[object], longest: int = 16) -> list[Run]:
    """Layers -> few runs of repeating patterns: greedily the pattern that covers most, the shortest of equals."""
    runs, start = [], 0
    while start < len(signatures):
        best = Run(start, 1, 1)
        for period in range(1, min(longest, len(signatures) - start) + 1):
            pattern, count = signatures[start : start + period], 1
            while signatures[start + count * period : start + (count + 1) * period] == pattern:
                count += 1
            if (count > 1 or period == 1) and count * period > best.count * best.period:
                best = Run(start, period, count)
        runs.append(best)
        start += best.period * best.count
    return runs
