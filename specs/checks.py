"""What can be checked of a spec without a checkpoint: names, uses, arities, and that every fact it reads has
an effect.
"""

from __future__ import annotations

from typing import Any

from specs.checks_graph import check_graph, check_names, check_uses, layered_parts
from specs.equations import (
    FUNCTIONS,
    INPUTS,
    LAYER,
    OUTPUTS,
    SEQUENCE_INPUTS,
    Constant,
    IfExp,
    Repeat,
    equations,
    walk,
)
from specs.errors import SpecRTError, Where
from specs.expressions import Expr
from specs.functions import CONSTANTS
from specs.functions import FUNCTIONS as SCALAR_FUNCTIONS
from specs.layouts import parse_layout
from specs.names import did_you_mean
from specs.node import Dimension, Node, Options, Returns
from specs.parts import NODE_CLASSES, Embedding, Linear, PartBase
from specs.schema import Spec

WELL_KNOWN = {
    "d_model": "width of the model",
    "vocab": "rows of the token table",
    "context": "longest sequence it was trained for",
}
"""Config names that have a meaning of their own; the builder and the compiler read them."""


def check_spec(spec: Spec) -> None:
    """Run every check; raises SPEC-0xx at the first mistake."""
    _check_config_names(spec)
    check_graph(spec)
    _check_parts(spec)
    check_uses(spec)
    _check_derive(spec)
    _check_checkpoint(spec)
    _check_sizes(spec)
    _check_config_used(spec)


def leaves(spec: Spec) -> list[str]:
    """Every weight name the parts may have: `embed`, `attn.q`, ..."""
    return [f"{name}.{leaf}" if leaf else name for name, part in spec.parts.items() for leaf in part.leaves]


def _place(spec: Spec, mapping: str, key: str) -> Where:
    return spec.key_where(mapping, key)


def _check_config_names(spec: Spec) -> None:
    options = {
        option
        for cls in NODE_CLASSES
        for _, marks in cls.field_marks()
        for m in marks
        if isinstance(m, Options)
        for option in m.values
    }
    taken = {
        **dict.fromkeys(options, "a value of a part's field"),
        **dict.fromkeys(INPUTS, "an input of the model"),
        **dict.fromkeys(OUTPUTS, "an output of the model"),
        **dict.fromkeys(CONSTANTS, "a constant"),
        **dict.fromkeys([*FUNCTIONS, *SCALAR_FUNCTIONS], "a function"),
        LAYER: "the layer's number",
    }
    for block, names in (("config", spec.config), ("parts", spec.parts)):
        for name in names:
            if not name.isidentifier():
                raise SpecRTError(
                    "SPEC-021",
                    f"`{name}` cannot be a name",
                    where=_place(spec, block, name),
                    hint="names are letters, digits and _",
                )
            if name in taken:
                raise SpecRTError(
                    "SPEC-021",
                    f"`{name}` is already {taken[name]}",
                    where=_place(spec, block, name),
                    hint="choose another name",
                )
            if block == "parts" and name in spec.config:
                raise SpecRTError(
                    "SPEC-021", f"`{name}` is both a part and a config name", where=_place(spec, block, name)
                )
    if "d_model" not in spec.config:
        raise SpecRTError(
            "SPEC-006",
            "`config` lacks the name `d_model`, the width of the model",
            where=spec.key_where("config"),
            hint="add `d_model: hidden_size`, or whatever their key is",
        )


def _check_parts(spec: Spec) -> None:
    layered = layered_parts(spec)
    for name, part in spec.parts.items():
        extra = (LAYER,) if name in layered else ()
        for field, expr, marks in part.expressions():
            options = {option for mark in marks if isinstance(mark, Options) for option in mark.values}
            inherited = any(isinstance(mark, Dimension) for mark in marks) and expr.where == part.where
            if inherited and expr.text not in spec.config:
                raise SpecRTError(
                    "SPEC-016",
                    f"part `{name}` needs `{field}`, and `config` does not define it",
                    where=part.where,
                    hint=f"write `{field}: ...` in the part, or define `{field}` in `config`",
                )
            if LAYER in expr.names() and not extra:
                raise SpecRTError(
                    "SPEC-011",
                    f"`layer` is not defined: part `{name}` is not used inside `repeat`",
                    where=expr.where,
                )
            check_names(spec, expr, {*extra, *options})
            if not expr.names():
                _check_literal(part, field, expr, marks)
        tied = part.tied if isinstance(part, Linear) else None
        tables = [other for other, kind in spec.parts.items() if isinstance(kind, Embedding | Linear) and other != name]
        if tied is not None and tied.to not in tables:
            raise SpecRTError(
                "SPEC-017",
                f"part `{name}` is tied to `{tied.to}`, which is no other embedding or linear part",
                where=tied.where,
                hint=did_you_mean(tied.to, tables),
            )


def _check_literal(part: PartBase, field: str, expr: Expr, marks: tuple[Any, ...]) -> None:
    """A value that needs no config must be of the field's type."""
    readers = {"int": expr.as_int, "float": expr.as_float, "bool": expr.as_bool, "str": expr.as_str}
    for mark in marks:
        if isinstance(mark, Returns) and mark.kind in readers and not (mark.or_none and expr.value({}) is None):
            readers[mark.kind]({})
        if isinstance(mark, Options):
            owner: Node = part
            *path, last = field.split(".")
            for name in path:
                owner = getattr(owner, name)
            owner.choice(last, {})


def _check_derive(spec: Spec) -> None:
    """What is derived is an input that a model can have, from names of `config`."""
    known = [name for name in (*INPUTS, *SEQUENCE_INPUTS) if name not in ("tokens", "positions")]
    for name, entry in spec.derive.items():
        if name not in known:
            raise SpecRTError(
                "SPEC-034",
                f"`{name}` is no input that can be derived",
                where=spec.key_where("derive", name),
                hint=did_you_mean(name, known),
            )
        for _, expr, _ in entry.expressions():
            check_names(spec, expr)


def _check_checkpoint(spec: Spec) -> None:
    for theirs in spec.spellings:
        if not (theirs.startswith(".") or theirs.endswith(".")):
            raise SpecRTError(
                "SPEC-030",
                f"the spelling `{theirs}` neither begins nor ends with a dot",
                where=spec.key_where("spellings", theirs),
                hint="write `.end`, `beginning.` or `.between.`",
            )
    known = leaves(spec)
    layered = layered_parts(spec)
    seen: dict[str, str] = {}
    for key, entry in spec.checkpoint.items():
        where = spec.key_where("checkpoint", key)
        if (entry.source is None) == (entry.weight is None and entry.bias is None):
            raise SpecRTError(
                "SPEC-030", f"`{key}` needs either `from` or the full names `weight`, `bias`", where=where
            )
        members = [key]
        if entry.layout is not None:
            layout = parse_layout(entry.layout, entry.where)
            for expr in [*layout.expressions(), *((entry.copies,) if entry.copies else ())]:
                check_names(spec, expr)
            prefix = key.rpartition(".")[0]
            members = [f"{prefix}.{piece.name}" if prefix else piece.name for piece in layout.pieces]
        for member in members:
            if member not in known:
                raise SpecRTError(
                    "SPEC-030",
                    f"`{member}` is not a weight of any part",
                    where=where,
                    hint=did_you_mean(member, known),
                )
            twin = seen.get(member)
            if twin is not None and entry.stacked == spec.checkpoint[twin].stacked:
                raise SpecRTError("SPEC-030", f"`{member}` is given twice, by `{twin}` and `{key}`", where=where)
            seen[member] = key
            for name in (entry.source, entry.weight, entry.bias, entry.mxfp4):
                if name is not None and ("{i}" in name) != (member.split(".")[0] in layered):
                    problem = (
                        "needs `{i}` for the layer"
                        if "{i}" not in name
                        else "has `{i}`, but the part is not in `repeat`"
                    )
                    raise SpecRTError("SPEC-030", f"`{name}` {problem}", where=where)


def _check_sizes(spec: Spec) -> None:
    for size, entry in spec.sizes.items():
        for name in entry.values:
            if name not in spec.config:
                raise SpecRTError(
                    "SPEC-019",
                    f"size `{size}` gives `{name}`, which `config` does not define",
                    where=spec.key_where("sizes", size, name),
                    hint=did_you_mean(name, spec.config),
                )


def _check_config_used(spec: Spec) -> None:
    """A config name that nothing uses would swallow a flag of config.json without effect."""
    used = set(WELL_KNOWN)
    exprs = [expr for part in spec.parts.values() for _, expr, _ in part.expressions()]
    exprs += spec.config.values()
    exprs += [expr for entry in spec.derive.values() for _, expr, _ in entry.expressions()]
    exprs += [step.count for step in spec.graph if isinstance(step, Repeat)]
    exprs += [step.when for step in equations(spec.graph) if step.when is not None]
    for equation in equations(spec.graph):
        for node in walk(equation.value):
            exprs += [node.expr] if isinstance(node, Constant) else [node.test] if isinstance(node, IfExp) else []
    for entry in spec.checkpoint.values():
        if entry.layout is not None:
            exprs += parse_layout(entry.layout, entry.where).expressions()
        exprs += [expr for _, expr, _ in entry.expressions()]
    for name, own in spec.config.items():
        others = (expr for expr in exprs if expr is not own)
        if name not in used and not any(name in {path.split(".")[0] for path in expr.names()} for expr in others):
            raise SpecRTError(
                "SPEC-026",
                f"config name `{name}` has no effect",
                where=own.where,
                hint="use it in a part or an equation, or list its key under `ignore: {config: [...]}`",
            )
