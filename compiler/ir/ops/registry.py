"""How an operation is defined: one decorated function whose signature is its type rule and whose body is its meaning.

    @op("x: F[*N,M], weight: F[M] -> F[*N,M]")
    def rms_norm(x, weight, *, eps: float):
        '''RMS norm (arXiv:1910.07467, eq. 4): ...'''
        ...PyTorch...

Type rule: `F` any float type, `I` any integer type, `T` any type; a letter that occurs twice means the same type twice.
`*N` binds any run of dims, a name binds one dim, a number is itself. `x?` may be left out. Where attributes decide the
result, `infer` computes it; `check` refuses what the rule can't say.
Keyword-only parameters are the attributes; their annotations are checked.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compiler.ir.core import Arg, AttrValue, Value
from compiler.ir.types import DTYPES, FLOATS, INTEGERS, Dim, TensorType

Infer = Callable[..., tuple[TensorType, ...]]


class TypeRuleError(ValueError):
    """An operand or attribute that an operation's type rule refuses; the verifier adds the place."""


@dataclass(frozen=True)
class Attribute:
    """A keyword-only parameter of an operation."""

    name: str
    annotation: str
    default: object  # inspect.Parameter.empty where required


@dataclass(frozen=True)
class Operand:
    """A positional parameter: the pattern of its type, and whether it may be left out."""

    name: str
    dtype: str
    shape: tuple[str, ...]
    optional: bool


@dataclass(frozen=True)
class Op:
    """An operation: name, operands, attributes, type rule, meaning."""

    name: str
    operands: tuple[Operand, ...]
    variadic: bool
    attributes: tuple[Attribute, ...]
    results: tuple[tuple[str, tuple[str, ...]], ...]
    infer: Infer | None
    check: Callable[..., None] | None  # what the signature can't say; raises TypeRuleError
    body: Callable[..., Any]
    doc: str
    signature: str
    source: bool  # its result's type is stated, not inferred
    literals: bool  # scalar literals allowed as operands
    effect: bool  # changes state: never removed, never reordered
    commutative: bool

    def infer_types(
        self, args: Sequence[Arg], attrs: Mapping[str, AttrValue], declared: TensorType | None = None
    ) -> tuple[TensorType, ...]:
        """The result types; sources (`weight`, `state`, `const`) have the `declared` one. Raises TypeRuleError."""
        given = self._check_attributes(attrs)
        self._check_operands(args)
        if self.source:
            if declared is None:
                raise TypeRuleError(f"`{self.name}` states its type")
            if self.infer is not None:
                self.infer(declared, **given)
            return (declared,)
        if self.infer is not None:
            return self.infer(*(arg.type if isinstance(arg, Value) else arg for arg in args), **given)
        types = _apply_rule(self, args)
        if self.check is not None:
            self.check(*(arg.type if isinstance(arg, Value) else arg for arg in args), **given)
        return types

    def _check_operands(self, args: Sequence[Arg]) -> None:
        if self.variadic and not args:
            raise TypeRuleError(f"`{self.name}` takes 1 or more operands, got none")
        low = sum(not operand.optional for operand in self.operands)
        if not self.variadic and not low <= len(args) <= len(self.operands):
            expected = str(low) if low == len(self.operands) else f"{low} to {len(self.operands)}"
            raise TypeRuleError(f"`{self.name}` takes {expected} operands, got {len(args)}")
        for index, arg in enumerate(args):
            operand = self.operands[min(index, len(self.operands) - 1)]
            if arg is None and not operand.optional:
                raise TypeRuleError(f"operand `{operand.name}` of `{self.name}` can't be left out")
            if isinstance(arg, Value) and not _of_class(operand.dtype, arg.type.dtype):
                raise TypeRuleError(f"operand `{operand.name}` must be {operand.dtype}, got {arg.type.dtype}")
            literal = arg is not None and not isinstance(arg, Value)
            if literal and not (self.literals and isinstance(arg, (int, float))):
                raise TypeRuleError(f"operand `{operand.name}` of `{self.name}` must be a value, got the literal {arg}")
        if self.literals and not any(isinstance(arg, Value) for arg in args):
            raise TypeRuleError(f"`{self.name}` of literals only: write the number")

    def _check_attributes(self, attrs: Mapping[str, AttrValue]) -> dict[str, AttrValue]:
        known = {attribute.name: attribute for attribute in self.attributes}
        for name in attrs:
            if name not in known:
                raise TypeRuleError(f"`{self.name}` has no attribute `{name}`; it has {', '.join(known) or 'none'}")
        for name, attribute in known.items():
            if name not in attrs:
                if attribute.default is inspect.Parameter.empty:
                    raise TypeRuleError(f"`{self.name}` lacks its attribute `{name}`")
            elif not _fits(attrs[name], attribute.annotation):
                message = f"attribute `{name}` of `{self.name}` must be {attribute.annotation}, got {attrs[name]!r}"
                raise TypeRuleError(message)
        return dict(attrs)


REGISTRY: dict[str, Op] = {}
_OPERAND = re.compile(r"(\w+)(\?)?:\s*(\w+)\[([^\]]*)\]")
_RESULT = re.compile(r"(\w+)\[([^\]]*)\]")


def op(
    signature: str,
    *,
    infer: Infer | None = None,
    check: Callable[..., None] | None = None,
    source: bool = False,
    literals: bool = False,
    effect: bool = False,
    commutative: bool = False,
    variadic: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the operation of its name (a trailing `_` is dropped)."""

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        left, _, right = signature.partition("->")
        operands = tuple(
            Operand(name, dtype, _dims(shape), bool(optional))
            for name, optional, dtype, shape in _OPERAND.findall(left)
        )
        results = tuple((dtype, _dims(shape)) for dtype, shape in _RESULT.findall(right))
        attributes = tuple(
            Attribute(parameter.name, str(parameter.annotation), parameter.default)
            for parameter in inspect.signature(body).parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        )
        name = body.__name__.rstrip("_")
        doc = inspect.getdoc(body) or ""
        REGISTRY[name] = Op(
            name, operands, variadic, attributes, results, infer, check, body, doc, signature,
            source, literals, effect, commutative,
        )  # fmt: skip
        return body

    return register


def _dims(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


_ANNOTATIONS: dict[str, Callable[[AttrValue], bool]] = {
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "float": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "None": lambda value: value is None,
    "Any": lambda _: True,
}


def _fits(value: AttrValue, annotation: str) -> bool:
    for part in annotation.split("|"):
        part = part.strip()
        items = re.fullmatch(r"tuple\[(.+), \.\.\.\]", part)
        if items is not None:
            if isinstance(value, tuple) and all(_fits(item, items.group(1).replace("/", "|")) for item in value):
                return True
        elif part == "Shape":
            if isinstance(value, tuple) and all(isinstance(item, (int, str)) for item in value):
                return True
        elif _ANNOTATIONS[part](value):
            return True
    return False


# -- the type-rule language -----------------------------------------------------------------------------------------


def _apply_rule(definition: Op, args: Sequence[Arg]) -> tuple[TensorType, ...]:
    dtypes: dict[str, str] = {}
    dims: dict[str, tuple[Dim, ...]] = {}
    for operand, arg in zip(definition.operands, args, strict=False):
        if isinstance(arg, Value):
            _bind_dtype(operand, arg.type.dtype, dtypes)
            _bind_shape(operand, arg.type.shape, dims)
    results = []
    for dtype, shape in definition.results:
        resolved: list[Dim] = []
        for part in shape:
            if part.isdigit():
                resolved.append(int(part))
            else:
                resolved += dims[part]
        results.append(TensorType(dtypes.get(dtype, dtype), tuple(resolved)))
    return tuple(results)


def _of_class(wanted: str, dtype: str) -> bool:
    """Whether an element type is what a rule's letter (F, I, T) or name allows."""
    if wanted in DTYPES:
        return dtype == wanted
    return wanted[0] == "T" or dtype in (FLOATS if wanted[0] == "F" else INTEGERS)


def _bind_dtype(operand: Operand, dtype: str, bound: dict[str, str]) -> None:
    if bound.setdefault(operand.dtype, dtype) != dtype:
        raise TypeRuleError(f"operand `{operand.name}` must be {bound[operand.dtype]}, got {dtype}")


def _bind_shape(operand: Operand, shape: tuple[Dim, ...], bound: dict[str, tuple[Dim, ...]]) -> None:
    star = next((index for index, part in enumerate(operand.shape) if part.startswith("*")), None)
    fixed = len(operand.shape) - (star is not None)
    got = ",".join(map(str, shape))
    if len(shape) < fixed or (star is None and len(shape) != fixed):
        raise TypeRuleError(f"operand `{operand.name}` must have shape [{','.join(operand.shape)}], got [{got}]")
    runs = len(shape) - fixed
    position = 0
    for part in operand.shape:
        take = runs if part.startswith("*") else 1
        dims = shape[position : position + take]
        position += take
        expected = (int(part),) if part.isdigit() else bound.setdefault(part, dims)
        if dims != expected:
            want = ",".join(map(str, expected))
            have = ",".join(map(str, dims))
            raise TypeRuleError(f"operand `{operand.name}` has shape [{got}]: `{part}` is [{have}], expected [{want}]")


def broadcast(*shapes: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The common shape under NumPy's rule, where a symbolic dim equals itself only; raises TypeRuleError."""
    rank = max(len(shape) for shape in shapes)
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    result: list[Dim] = []
    for dims in zip(*padded, strict=True):
        wide = {dim for dim in dims if dim != 1}
        if len(wide) > 1:
            text = " and ".join("[" + ",".join(map(str, shape)) + "]" for shape in shapes)
            raise TypeRuleError(f"shapes {text} do not broadcast")
        result.append(wide.pop() if wide else 1)
    return tuple(result)
