"""Rows: replacing the leading dims of values, [B,S,...] by [T,...] or [T,...] by [N,...], where that means the same.

An equation keeps rows if each row of its result depends on the same row of its operands only. Then its leading dims
may be anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from compiler.ir.core import Arg, AttrValue, Equation, Value
from compiler.ir.ops import REGISTRY, Op, TypeRuleError
from compiler.ir.types import Shape, TensorType
from compiler.passes.pattern import show


def has_rows(value: Arg, rows: Shape) -> bool:
    """Whether a value's leading dims are `rows`."""
    return isinstance(value, Value) and value.type.shape[: len(rows)] == rows


def why_not(equation: Equation, rows: Shape) -> str | None:
    """The reason why an equation on operands of leading dims `rows` does not keep them apart, or None where it does."""
    leading = [has_rows(arg, rows) for arg in equation.args]
    inner = {arg.name: arg.type.rank - len(rows) for arg in equation.values if has_rows(arg, rows)}
    op = equation.op
    if _is_elementwise(REGISTRY[op]):
        rank = equation.result.type.rank
        for arg in equation.values:
            if has_rows(arg, rows) and arg.type.rank != rank:
                return f"%{arg.name} {arg.type} is broadcast to {equation.result.type}"
            if not has_rows(arg, rows) and arg.type.rank > rank - len(rows):
                return f"%{arg.name} {arg.type} is aligned with the dims {_text(rows)} of another operand"
        return None
    if op == "matmul":
        a, b = equation.values
        if all(leading) and inner[a.name] >= 2 and inner[b.name] >= 2:
            return None  # a product of its own for each row
        if leading[1] or not leading[0] or b.type.rank != 2 or inner[a.name] < 1:
            return f"{show(equation)} is no product of rows with one matrix"
        return None
    if op == "gather":
        return f"{show(equation)} looks up rows" if leading[0] else None
    if op == "reshape":
        if equation.result.type.shape[: len(rows)] != rows:
            return f"{show(equation)} takes the dims {_text(rows)} apart"
        return None
    if op in ("transpose", "slice", "concat"):
        reach = len(_tuple(equation.attr["axes"])) if op == "transpose" else -_int(equation.attr["axis"])
        if not all(leading) or any(rank < reach for rank in inner.values()):
            return f"{show(equation)} moves the dims {_text(rows)}"
        return None
    if op == "paged_attention":
        # It reads q, k and v as rows that belong to sequences; the other operands say to which.
        return None if all(leading[:3]) and not any(leading[3:]) else f"{show(equation)} has operands that are no rows"
    return _by_signature(equation, rows)


def _is_elementwise(definition: Op) -> bool:
    shapes = [operand.shape for operand in definition.operands] + [shape for _, shape in definition.results]
    return all(shape == ("*N",) for shape in shapes) and definition.name != "repeat"


def _by_signature(equation: Equation, rows: Shape) -> str | None:
    """An operation on F[*N,M] does the same whatever *N is: rows may be in it, and nowhere else."""
    definition = REGISTRY[equation.op]
    if not all(shape[:1] == ("*N",) for _, shape in definition.results):
        return f"`{equation.op}` works on {_text(rows)} as such"
    for operand, arg in zip(definition.operands, equation.args, strict=False):
        if not isinstance(arg, Value):
            continue
        if operand.shape[:1] != ("*N",):
            if has_rows(arg, rows):
                return f"`{equation.op}` reads its operand `{operand.name}` whole"
        elif not has_rows(arg, rows):
            return f"%{arg.name} {arg.type} has no rows"
        elif arg.type.rank - len(rows) < len(operand.shape) - 1:
            return f"{show(equation)} mixes the dims {_text(rows)}"
    return None


def replace_rows(equation: Equation, values: Mapping[str, Value], old: Shape, new: Shape) -> Equation:
    """The equation on the replaced operands `values`, its own results with `new` for `old`; names stay.

    Raises TypeRuleError where that is not well typed.
    """
    args = tuple(values.get(arg.name, arg) if isinstance(arg, Value) else arg for arg in equation.args)
    attrs = equation.attrs
    if equation.op == "reshape":
        shape = _tuple(equation.attr["shape"])
        attrs = (("shape", new + shape[len(old) :]),)
    expected = tuple(replaced_type(value.type, old, new) for value in equation.results)
    types = REGISTRY[equation.op].infer_types(args, dict(attrs), equation.results[0].type)
    if types != expected:
        raise TypeRuleError(f"{show(equation)} would be {', '.join(map(str, types))}")
    results = tuple(Value(value.name, kind) for value, kind in zip(equation.results, types, strict=True))
    return replace(equation, args=args, attrs=attrs, results=results)


def replaced_type(kind: TensorType, old: Shape, new: Shape) -> TensorType:
    """The type with leading dims `new` in place of `old`."""
    return TensorType(kind.dtype, new + kind.shape[len(old) :])


def _text(rows: Shape) -> str:
    return "[" + ",".join(map(str, rows)) + "]"


def _tuple(value: AttrValue) -> Shape:
    assert isinstance(value, tuple)
    return value  # type: ignore[return-value]  # the type rule of reshape and transpose holds (C4)


def _int(value: AttrValue) -> int:
    assert isinstance(value, int)
    return value
