"""Rotary frequencies: the formulas are data (specs/rope_scaling.yaml), evaluated in float32 with the spec
expression language.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.errors import SpecRTError, Where
from specs.expressions import Expr, evaluate, parse_expr
from specs.names import did_you_mean, nearest
from specs.yaml_loader import Scalar, YamlList, YamlMap, load_yaml

if TYPE_CHECKING:
    import numpy

_FILE = Path(__file__).with_name("rope_scaling.yaml")
_NOT_A_FORMULA = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
"""Keys of the mapping that the spec reads by itself (`dims`, `theta`) or that name the type."""


@dataclass(frozen=True)
class RopeFormula:
    """One entry of rope_scaling.yaml."""

    needs: tuple[str, ...]
    optional: dict[str, Expr]
    let: dict[str, Expr]
    frequencies: Expr
    multiplier: Expr
    limit: Expr | None  # sequences longer than this ...
    beyond: Expr | None  # ... have these frequencies; None: no formula here is right for them


@dataclass(frozen=True)
class Frequencies:
    """Rotary frequencies, float32 [dims/2], and the factor on cos and sin.

    Sequences of more than `limit` tokens have the frequencies `beyond`; where that is None, none here are right.
    """

    kind: str
    short: numpy.ndarray[Any, Any]
    multiplier: float
    limit: int | None = None
    beyond: numpy.ndarray[Any, Any] | None = None


@lru_cache
def rope_formulas() -> dict[str, RopeFormula]:
    """The formulas by rope type."""
    found: dict[str, RopeFormula] = {}
    for name, node in load_yaml(_FILE).items():
        if isinstance(node, YamlMap):
            same = node.get("same_as")
            found[name] = found[str(same.value)] if isinstance(same, Scalar) else _formula(node)
    return found


def _formula(node: YamlMap) -> RopeFormula:
    def exprs(key: str) -> dict[str, Expr]:
        block = node.get(key)
        items = block.items() if isinstance(block, YamlMap) else ()
        return {name: parse_expr(value.value, value.where) for name, value in items if isinstance(value, Scalar)}

    def one(key: str, default: Scalar) -> Expr:
        value = node.get(key, default)
        assert isinstance(value, Scalar)
        return parse_expr(value.value, value.where)

    def maybe(key: str) -> Expr | None:
        return one(key, Scalar(None, node.where)) if key in node else None

    needs = node.get("needs", YamlList(node.where))
    assert isinstance(needs, YamlList)
    return RopeFormula(
        needs=tuple(str(item.value) for item in needs if isinstance(item, Scalar)),
        optional=exprs("optional"),
        let=exprs("let"),
        frequencies=one("frequencies", Scalar("f", node.where)),
        multiplier=one("multiplier", Scalar(1.0, node.where)),
        limit=maybe("limit"),
        beyond=maybe("beyond"),
    )


def inv_freq(
    dims: int,
    theta: float,
    scaling: Mapping[str, Any] | None,
    context: int | None = None,
    where: Where | None = None,
    original: int | None = None,
) -> Frequencies:
    """Rotary frequencies; `context` stands in for a missing original length, `original` wins over the mapping's.

    `scaling` is the checkpoint's mapping (`rope_type` or `type`, and its parameters) or None; raises
    SPEC-050, SPEC-053 to SPEC-055.
    """
    import numpy

    if dims <= 0 or dims % 2:
        raise SpecRTError("SPEC-053", f"the rotated dimensions must be an even number above 0, not {dims}", where=where)
    # The power is rounded once, as PyTorch's float32 one nearly always is; the rest is float32 throughout.
    exponents = numpy.arange(0, dims, 2, dtype=numpy.float32) / numpy.float32(dims)
    powers = numpy.power(numpy.float64(theta), exponents.astype(numpy.float64)).astype(numpy.float32)
    frequencies = numpy.float32(1.0) / powers
    if scaling is not None and not isinstance(scaling, Mapping):
        raise SpecRTError("SPEC-054", f"the rope scaling must be a mapping, not {scaling!r}", where=where)
    kind, formula = _select(scaling or {}, where)
    if original is not None and "original_max_position_embeddings" in formula.optional:
        scaling = {**(scaling or {}), "original_max_position_embeddings": original}
    env: dict[str, Any] = {
        "f": frequencies,
        "i": numpy.arange(dims // 2, dtype=numpy.float32),
        "dims": dims,
        "theta": float(theta),
    }
    if context is not None:
        env["context"] = context
    env.update(_parameters(kind, formula, scaling or {}, env, where))
    for name, value in env.items():
        if isinstance(value, list):  # one number for each frequency
            if len(value) != dims // 2:
                message = f"the rope parameter `{name}` has {len(value)} numbers, expected {dims // 2}"
                raise SpecRTError("SPEC-054", message, where=where, hint=f"one for each pair of the {dims} dims")
            env[name] = numpy.array(value, dtype=numpy.float32)
    with numpy.errstate(all="ignore"):  # what comes out is checked below
        for name, expr in formula.let.items():
            env[name] = evaluate(expr, env)
        short, *beyond = (
            numpy.asarray(evaluate(expr, env), dtype=numpy.float32)
            for expr in (formula.frequencies, formula.beyond)
            if expr is not None
        )
    multiplier = float(evaluate(formula.multiplier, env))
    if not (all(numpy.isfinite(f).all() and (f > 0).all() for f in (short, *beyond)) and multiplier > 0):
        raise SpecRTError(
            "SPEC-054", f"rope type `{kind}` gives impossible frequencies with {dict(scaling or {})}", where=where
        )
    limit = None if formula.limit is None else formula.limit.as_int(env)
    return Frequencies(kind, short, multiplier, limit, beyond[0] if beyond else None)


def _select(scaling: Mapping[str, Any], where: Where | None) -> tuple[str, RopeFormula]:
    formulas = rope_formulas()
    names = {str(scaling[key]) for key in ("rope_type", "type") if scaling.get(key) is not None}
    if len(names) > 1:
        raise SpecRTError(
            "SPEC-050",
            f"the rope scaling names two types: {', '.join(f'`{name}`' for name in sorted(names))}",
            where=where,
        )
    kind = names.pop() if names else "default"
    if kind not in formulas:
        raise SpecRTError(
            "SPEC-050",
            f"the checkpoint's rope scaling is of an unknown type, `{kind}`",
            where=where,
            notes=("known: " + ", ".join(f"`{name}`" for name in formulas),),
            hint=did_you_mean(kind, formulas)
            if nearest(kind, formulas)
            else f"a rope type is an entry of specs/{_FILE.name}: add its formula there",
        )
    return kind, formulas[kind]


def _parameters(
    kind: str, formula: RopeFormula, scaling: Mapping[str, Any], env: Mapping[str, Any], where: Where | None
) -> dict[str, Any]:
    given = {key: value for key, value in scaling.items() if key not in _NOT_A_FORMULA and value is not None}
    allowed = [*formula.needs, *formula.optional]
    for key, value in given.items():
        if key not in allowed and value:
            raise SpecRTError(
                "SPEC-054",
                f"rope type `{kind}` has no parameter `{key}`",
                where=where,
                hint=did_you_mean(key, allowed),
            )
        numbers = value if isinstance(value, list) else [value]
        if not all(isinstance(number, int | float) for number in numbers):
            raise SpecRTError("SPEC-054", f"the rope parameter `{key}` must be a number, not {value!r}", where=where)
    values = {key: value for key, value in given.items() if key in allowed}
    for key in formula.needs:
        if key not in values:
            raise SpecRTError("SPEC-055", f"rope type `{kind}` needs the parameter `{key}`", where=where)
    for key, default in formula.optional.items():
        if key in values:
            continue
        if "context" in default.names() and "context" not in env:
            raise SpecRTError(
                "SPEC-055",
                f"rope type `{kind}` needs the parameter `{key}`",
                where=where,
                hint="or give the position part its `context`",
            )
        values[key] = evaluate(default, {**env, **values})
    return values
