"""The base of every schema class: pydantic, frozen, no unknown keys, and errors that point at a line of the
YAML file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.functional_validators import ModelWrapValidatorHandler

from specs import yaml_loader
from specs.errors import SpecRTError, Where
from specs.expressions import Expr, parse_expr, shift
from specs.names import did_you_mean
from specs.yaml_loader import Scalar, YamlList, YamlMap


@dataclass(frozen=True)
class Returns:
    """What an expression field must come out as: int, float, bool, str or value (anything); `or_none`: or none."""

    kind: str
    or_none: bool = False


@dataclass(frozen=True)
class Dimension:
    """Marks a field that, left out, is the `config:` name spelled like the field."""


@dataclass(frozen=True)
class Options:
    """Marks a text field with a closed set of values, which may be written as bare words; `spellings` are other names
    of theirs, as checkpoints write them.
    """

    values: tuple[str, ...]
    spellings: Mapping[str, str] = field(default_factory=dict, hash=False)


def _expr(node: Any) -> Expr:
    if isinstance(node, Expr):
        return node
    if isinstance(node, Scalar):
        if node.value is None:
            raise SpecRTError(
                "SPEC-005", "a value is missing", where=node.where, hint="write the value, or remove the key"
            )
        return parse_expr(node.value, shift(node.where, 1) if node.quoted else node.where)
    raise SpecRTError("SPEC-005", "expected one value or expression, found a nested structure", where=node.where)


def _text(node: Any) -> str:
    if isinstance(node, Scalar):
        if isinstance(node.value, str):
            return node.value
        raise SpecRTError("SPEC-005", "expected text", where=node.where)
    if isinstance(node, YamlMap | YamlList):
        raise SpecRTError("SPEC-005", "expected text, found a nested structure", where=node.where)
    return node  # type: ignore[no-any-return]


def _scalar(node: Any) -> Any:
    return node.value if isinstance(node, Scalar) else node


def _plain(node: Any) -> Any:
    return yaml_loader.plain(node) if isinstance(node, Scalar | YamlMap | YamlList) else node


def _expr_list(node: Any) -> tuple[Expr, ...]:
    items = node if isinstance(node, YamlList | tuple) else [node]
    return tuple(_expr(item) for item in items)


_ExprField = Annotated[Expr, PlainValidator(_expr)]
ExprList = Annotated[tuple[Expr, ...], PlainValidator(_expr_list)]
IntExpr = Annotated[_ExprField, Returns("int")]
FloatExpr = Annotated[_ExprField, Returns("float")]
IntOrNone = Annotated[_ExprField, Returns("int", or_none=True)]
FloatOrNone = Annotated[_ExprField, Returns("float", or_none=True)]
BoolExpr = Annotated[_ExprField, Returns("bool")]
StrExpr = Annotated[_ExprField, Returns("str")]
ValueExpr = Annotated[_ExprField, Returns("value")]
Dim = Annotated[_ExprField, Returns("int"), Dimension()]
Int = Annotated[int, BeforeValidator(_scalar)]
Bool = Annotated[bool, BeforeValidator(_scalar)]
Text = Annotated[str, BeforeValidator(_text)]
Plain = Annotated[Any, BeforeValidator(_plain)]


def marks_of(info: FieldInfo) -> tuple[Any, ...]:
    """The Returns, Dimension and Options marks of a field, also when it may be absent (`X | None`)."""
    found = list(info.metadata)
    for choice in get_args(info.annotation):
        found += [mark for mark in get_args(choice)[1:] if isinstance(mark, Returns | Dimension | Options)]
    return tuple(mark for mark in found if isinstance(mark, Returns | Dimension | Options))


class Node(BaseModel):
    """A mapping of the spec file; `where` is its first character."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)
    title: ClassVar[str] = "mapping"
    where: Where = Field(exclude=True, repr=False)

    @model_validator(mode="wrap")
    @classmethod
    def _locate(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        if isinstance(data, cls):
            return data
        if not isinstance(data, YamlMap):
            where = getattr(data, "where", None)
            raise SpecRTError(
                "SPEC-005",
                f"expected a mapping for {cls.title}",
                where=where,
                hint="its keys: " + ", ".join(f"`{key}`" for key in cls.yaml_keys()),
            )
        known = cls.yaml_keys()
        for key in data:
            if key not in known:
                raise SpecRTError(
                    "SPEC-004",
                    f"unknown key `{key}` in {cls.title}",
                    where=data.key_where[key],
                    hint=_unknown_key_hint(key, known),
                )
        values: dict[str, Any] = {**data, "where": data.where}
        if "places" in cls.model_fields:
            values["places"] = dict(_places(data))
        for name, info in cls.model_fields.items():
            if any(isinstance(mark, Dimension) for mark in marks_of(info)):
                values.setdefault(name, parse_expr(name, data.where))
        try:
            return handler(values)
        except ValidationError as error:
            raise _convert(cls, data, error) from error

    @classmethod
    def yaml_keys(cls) -> list[str]:
        """The keys that the YAML mapping may have."""
        return [info.alias or name for name, info in cls.model_fields.items() if name not in ("where", "places")]

    @classmethod
    def field_marks(cls) -> list[tuple[str, tuple[Any, ...]]]:
        """The name and the marks (Returns, Dimension, Options) of each field."""
        return [(name, marks_of(info)) for name, info in cls.model_fields.items()]

    def expressions(self) -> list[tuple[str, Expr, tuple[Any, ...]]]:
        """Every expression in this node and below it: dotted field name, expression, marks (Returns,
        Dimension, Options).
        """
        found: list[tuple[str, Expr, tuple[Any, ...]]] = []
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Expr):
                found.append((name, value, marks_of(info)))
            elif isinstance(value, tuple):
                found += [(name, item, ()) for item in value if isinstance(item, Expr)]
            elif isinstance(value, Node):
                found += [(f"{name}.{inner}", expr, marks) for inner, expr, marks in value.expressions()]
        return found

    def choice(self, name: str, env: Mapping[str, Any]) -> str:
        """The value of the closed text field `name` (say `mask`), one of its options; raises SPEC-014."""
        expr: Expr = getattr(self, name)
        mark = next(m for m in marks_of(type(self).model_fields[name]) if isinstance(m, Options))
        options = mark.values
        value = expr.as_str({**{option: option for option in options}, **env})
        value = mark.spellings.get(value, value)
        if value not in options:
            raise SpecRTError(
                "SPEC-014",
                f"`{name}` is `{value}`, which is not one of its values",
                where=expr.where,
                hint="known: " + ", ".join(f"`{option}`" for option in options),
            )
        return value


def _places(data: YamlMap, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Where]]:
    """The path and place of every key of the file."""
    for key, value in data.items():
        yield (*path, key), data.key_where[key]
        if isinstance(value, YamlMap):
            yield from _places(value, (*path, key))


def _unknown_key_hint(key: str, known: list[str]) -> str | None:
    if ":" in key:
        return "put a space after the colon"
    return did_you_mean(key, known)


def _convert(cls: type[Node], data: YamlMap, error: ValidationError) -> SpecRTError:
    """The first of pydantic's complaints, in our words, at its place in the file."""
    first = error.errors(include_url=False)[0]
    loc = first["loc"]
    key = str(loc[0]) if loc else ""
    if first["type"] == "missing":
        return SpecRTError("SPEC-006", f"{cls.title} lacks the key `{key}`", where=data.where)
    node: Any = data
    for part in loc:
        in_map = isinstance(node, YamlMap) and part in node
        if in_map or (isinstance(node, YamlList) and isinstance(part, int)):
            node = node[part]
    return SpecRTError(
        "SPEC-005", f"`{key}` in {cls.title}: {first['msg'][0].lower()}{first['msg'][1:]}", where=node.where
    )
