"""What each operation makes of operands that ranks hold in parts (as in arXiv:2105.04663, section 3): one rule each.

A rule emits the operation on what this rank has and says how the result is held. Products by weights begin split, by
output features after a whole operand, which leaves sums after a split one (arXiv:1909.08053, section 3); what can't go
on with a split operand raises MismatchError, and the products that it comes from are split less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import TYPE_CHECKING

from compiler.ir.core import Equation, Value
from compiler.ir.types import DTYPES, Dim
from compiler.passes.split_attention import attention
from compiler.passes.split_layouts import Held, Layout, MismatchError, Split, Sum
from compiler.passes.split_weights import ELEMENTWISE, along
from specs.errors import SpecRTError

if TYPE_CHECKING:
    from compiler.passes.split_tensors import Splitter

Rule = Callable[["Splitter", Equation], None]


def whole(ranks: Splitter, equation: Equation) -> None:
    """Every operand whole, as is the result."""
    for value in equation.values:
        layout = ranks.settled(value).layout
        if isinstance(layout, Split):
            raise MismatchError((layout,), f"`{equation.op}` needs all of %{value.name}")
    ranks.emit(equation, [ranks.settled(value).value for value in equation.values], None)


# -- element by element -----------------------------------------------------------------------------------------------


def elementwise(ranks: Splitter, equation: Equation) -> None:
    """Parts with parts of the same elements; what this rank can't make a part of must not differ along the axis."""
    if _linear(ranks, equation):
        return
    ranks.emit(equation, *_aligned(ranks, equation))


def _aligned(ranks: Splitter, equation: Equation) -> tuple[list[Value], Layout]:
    helds = [ranks.settled(value) for value in equation.values]
    splits = [held.layout for held in helds if isinstance(held.layout, Split)]
    if not splits:
        return [held.value for held in helds], None
    split = next((item for item in splits if not item.own), splits[0])
    for other in splits:
        if other.axis != split.axis:
            raise MismatchError(splits, f"`{equation.op}` of values that are split along different axes")
        if not other.own and other.parts != split.parts:
            parts = gcd(other.parts, split.parts)
            raise MismatchError(splits, f"`{equation.op}` of {other.parts} and {split.parts} parts", parts)
    values: list[Value] = []
    for value, held in zip(equation.values, helds, strict=True):
        if held.layout is not None or not along(value, split.axis):
            values.append(held.value)
            continue
        part = f"%{value.name} is not in parts" if split.own else ranks.parts.of(value, split.axis, split.parts)
        if isinstance(part, str):
            raise MismatchError(splits, f"`{equation.op}` with a value that is whole: {part}")
        values.append(part)
    origins = frozenset(origin for item in splits for origin in item.origins)
    return values, Split(split.axis, split.parts, origins, split.own)


def _linear(ranks: Splitter, equation: Equation) -> bool:
    """Sums stay sums under what is linear in them; whether that was so."""
    helds = [ranks.held[value.name] for value in equation.values]
    sums = [held for held in helds if isinstance(held.layout, Sum)]
    if not sums or (len(helds) < len(equation.args) and equation.op == "add"):
        return False
    if equation.op == "add":
        return _added(ranks, equation, helds)
    if equation.op in ("mul", "div") and len(sums) == 1 and isinstance(equation.args[0], Value):
        others = [held for held in helds if held.layout is None]
        scaled = equation.op == "mul" or isinstance(helds[0].layout, Sum)
        return scaled and len(others) == len(helds) - 1 and _mapped(ranks, equation)
    if equation.op == "cast":
        kinds = (equation.values[0].type.dtype, equation.result.type.dtype)
        return DTYPES[kinds[1]] > DTYPES[kinds[0]] and _mapped(ranks, equation)
    return False


def _added(ranks: Splitter, equation: Equation, helds: Sequence[Held]) -> bool:
    sums = [held for held in helds if isinstance(held.layout, Sum)]
    if any(isinstance(held.layout, Split) for held in helds):
        return False
    if any(held.value.type.shape != equation.result.type.shape for held in sums):
        return False
    plus = tuple(held.value for held in helds if held.layout is None)
    plus += tuple(value for held in sums if isinstance(held.layout, Sum) for value in held.layout.plus)
    if len(sums) == len(helds):
        ranks.emit(equation, [held.value for held in sums], Sum(plus))
    else:
        ranks.held[equation.result.name] = Held(sums[0].value, Sum(plus))
    return True


def _mapped(ranks: Splitter, equation: Equation) -> bool:
    """The operation on a sum and on each value that joins it: f(a + b) is f(a) + f(b)."""
    helds = [ranks.held[value.name] for value in equation.values]
    place = next(index for index, held in enumerate(helds) if isinstance(held.layout, Sum))
    layout = helds[place].layout
    assert isinstance(layout, Sum)
    if any(value.type.shape != helds[place].value.type.shape for value in layout.plus):
        return False
    values = [held.value for held in helds]
    plus = tuple(ranks.another(equation, [*values[:place], value, *values[place + 1 :]]) for value in layout.plus)
    ranks.emit(equation, values, Sum(plus))
    return True


# -- products ---------------------------------------------------------------------------------------------------------


def product(ranks: Splitter, equation: Equation) -> None:
    """Split by output features, or over the features that it contracts, which gives sums."""
    a, b, *chosen = equation.values
    transposed = equation.op == "gather_matmul" or bool(equation.attr.get("transpose_b", False))
    inner, outer = (-1, -2) if transposed else (-2, -1)
    index = [ranks.settled(value) for value in chosen]
    x = ranks.settled(a)
    if isinstance(ranks.held[b.name].layout, Sum) and x.layout is None and not chosen and _mapped(ranks, equation):
        return
    w = ranks.settled(b)
    splits = [held.layout for held in (x, w, *index) if isinstance(held.layout, Split)]
    more = [held.value for held in index]
    if not splits:
        _by_output(ranks, equation, outer, more)
    elif isinstance(x.layout, Split) and x.layout.axis == -1 and w.layout is None:
        _by_input(ranks, equation, x.layout, inner, more)
    elif isinstance(x.layout, Split) and x.layout.axis < -1 and w.layout is None and b.type.rank == 2:
        ranks.emit(equation, [x.value, w.value, *more], x.layout)
    elif x.layout is None and splits == [w.layout] and splits[0].axis == outer and not splits[0].own:
        ranks.emit(equation, [x.value, w.value, *more], Split(-1, splits[0].parts, splits[0].origins))
    else:
        raise MismatchError(splits, f"`{equation.op}` of %{a.name} and %{b.name}, both split")


def _by_output(ranks: Splitter, equation: Equation, axis: int, more: list[Value]) -> None:
    name, (a, b) = equation.result.name, equation.values[:2]
    parts, layout, weight = ranks.wanted(name), None, ranks.settled(b).value
    if parts > 1:
        part = ranks.parts.of(b, axis, parts)
        if isinstance(part, str):
            ranks.stays(name, part)
        else:
            weight, layout = part, Split(-1, parts, frozenset((name,)))
    ranks.emit(equation, [ranks.settled(a).value, weight, *more], layout)


def _by_input(ranks: Splitter, equation: Equation, split: Split, axis: int, more: list[Value]) -> None:
    a, b = equation.values[:2]
    if split.parts != ranks.count or split.own:
        raise MismatchError((split,), f"`{equation.op}` would add up parts that several ranks hold")
    part = ranks.parts.of(b, axis, split.parts)
    if isinstance(part, str):
        raise SpecRTError(
            "PASS-004",
            f"{_stored_name(ranks, b)} can't be split over {split.parts} GPUs: {part}",
            where=equation.where,
            hint="take fewer GPUs for `tensor`, a precision with smaller groups, or stages of a pipeline instead",
        )
    ranks.emit(equation, [ranks.held[a.name].value, part, *more], Sum())
    ranks.log.hit("rows", equation.result.name, equation.where)


def _stored_name(ranks: Splitter, value: Value) -> str:
    """The name that a weight is stored under."""
    equation = ranks.made.get(value.name)
    while equation is not None and equation.op != "weight" and equation.values:
        equation = ranks.made.get(equation.values[0].name)
    name = None if equation is None else equation.attr.get("name")
    return f"%{value.name}" if name is None else f"`{str(name).removesuffix('.codes')}`"


# -- rows and moves ---------------------------------------------------------------------------------------------------


def by_row(ranks: Splitter, equation: Equation) -> None:
    """Along the last axis it needs all of its first operand, or is done for each row alone."""
    x, *others = (ranks.settled(value) for value in equation.values)
    _refuse_split(equation, others)
    if isinstance(x.layout, Split) and x.layout.axis == -1:
        raise MismatchError((x.layout,), f"`{equation.op}` needs whole rows of %{equation.values[0].name}")
    ranks.emit(equation, [x.value, *(held.value for held in others)], x.layout)


def _refuse_split(equation: Equation, helds: Sequence[Held]) -> None:
    splits = [held.layout for held in helds if isinstance(held.layout, Split)]
    if splits:
        raise MismatchError(splits, f"an operand of `{equation.op}` is split")


def row_scale(ranks: Splitter, equation: Equation) -> None:
    """Of a part of a row: its own scale, as that part is rounded alone; of blocks, those of the part."""
    x = ranks.settled(equation.values[0])
    layout, block = x.layout, equation.attr.get("block")
    if isinstance(layout, Split) and layout.axis == -1:
        size = int(str(x.value.type.shape[-1]))
        if not isinstance(block, int):
            layout = Split(-1, layout.parts, layout.origins, own=True)
        elif size % block:
            raise SpecRTError(
                "PASS-004",
                f"%{equation.values[0].name} can't be split over {layout.parts} GPUs: parts of {size} cut a block of "
                f"{block} that shares a scale",
                where=equation.where,
                hint="take fewer GPUs for `tensor`, or stages of a pipeline instead",
            )
    ranks.emit(equation, [x.value], layout)


def reshape(ranks: Splitter, equation: Equation) -> None:
    """The split axis stays the first of a run of dims that become others, or those become it."""
    if isinstance(ranks.held[equation.values[0].name].layout, Sum) and _mapped(ranks, equation):
        return
    x = ranks.settled(equation.values[0])
    shape, layout = equation.result.type.shape, x.layout
    if isinstance(layout, Split):
        axis = None if layout.own else _moved(equation.values[0].type.shape, layout.axis, shape)
        if axis is None:
            raise MismatchError((layout,), f"`reshape` of %{equation.values[0].name} takes its parts apart")
        size = int(str(shape[axis]))
        if size % layout.parts:
            reason = f"%{equation.result.name} has {size} of what is split in {layout.parts}"
            raise MismatchError((layout,), reason, gcd(size, layout.parts))
        layout = Split(axis, layout.parts, layout.origins)
        at = len(shape) + axis
        shape = (*shape[:at], size // layout.parts, *shape[at + 1 :])
    ranks.emit(equation, [x.value], layout, {"shape": shape})


def _moved(old: Sequence[Dim], axis: int, new: Sequence[Dim]) -> int | None:
    """The axis of the new shape whose run begins where that of the old axis does."""
    run = _run(old, axis)
    found = [place for place in range(-len(new), 0) if run is not None and _run(new, place) == run]
    sized = [place for place in found if new[place] != 1]
    return sized[0] if sized else None


def _run(shape: Sequence[Dim], axis: int) -> int | None:
    """Elements from an axis to the end."""
    total = 1
    for dim in shape[axis:]:
        if not isinstance(dim, int):
            return None
        total *= dim
    return total


def transpose(ranks: Splitter, equation: Equation) -> None:
    """The split goes where its axis goes."""
    if isinstance(ranks.held[equation.values[0].name].layout, Sum) and _mapped(ranks, equation):
        return
    x = ranks.settled(equation.values[0])
    axes, layout = equation.attr["axes"], x.layout
    assert isinstance(axes, tuple)
    if isinstance(layout, Split) and layout.axis in axes:
        layout = Split(axes.index(layout.axis) - len(axes), layout.parts, layout.origins, layout.own)
    ranks.emit(equation, [x.value], layout)


def gather(ranks: Splitter, equation: Equation) -> None:
    """Rows of a table whose rows are split; an order of what is split takes an exchange, by which all see all."""
    table, index = equation.values
    dims = equation.attr.get("dims", 1)
    if isinstance(ranks.held[table.name].layout, Sum) and dims == 1 and _mapped(ranks, equation):
        return
    x, at = ranks.settled(table), ranks.settled(index)
    _refuse_split(equation, [at])
    if isinstance(x.layout, Split) and -x.layout.axis > table.type.rank - int(str(dims)):
        _ordered(ranks, equation, x.layout)
    else:
        ranks.emit(equation, [x.value, at.value], x.layout)


def _ordered(ranks: Splitter, equation: Equation, split: Split) -> None:
    """Columns of a value in another order: all gathered, and of the order each rank's part."""
    table, index = equation.values
    before = ranks.made.get(table.name)
    part = ranks.parts.of(index, -1, split.parts)
    if before is None or before.op != "transpose" or isinstance(part, str) or split.parts != ranks.count:
        raise MismatchError((split,), f"`gather` looks up what is split of %{table.name}")
    columns = ranks.another(before, [ranks.gathered(before.values[0])])
    ranks.emit(equation, [columns, part], split)


def concat(ranks: Splitter, equation: Equation) -> None:
    """Parts beside each other, not one after the other."""
    values, layout = _aligned(ranks, equation)
    if isinstance(layout, Split) and (layout.axis == equation.attr["axis"] or layout.own):
        raise MismatchError((layout,), f"`{equation.op}` along the axis that is split")
    ranks.emit(equation, values, layout)


def slice_(ranks: Splitter, equation: Equation) -> None:
    """The same elements of each part."""
    x = ranks.settled(equation.values[0])
    if isinstance(x.layout, Split) and x.layout.axis == equation.attr["axis"]:
        raise MismatchError((x.layout,), "`slice` along the axis that is split")
    ranks.emit(equation, [x.value], x.layout)


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(("matmul", "gather_matmul"), product),
    **dict.fromkeys(("attention", "paged_attention"), attention),
    **dict.fromkeys(("rms_norm", "layer_norm", "rotate"), by_row),
    "row_scale": row_scale,
    "reshape": reshape,
    "transpose": transpose,
    "gather": gather,
    "concat": concat,
    "slice": slice_,
}
