"""Field types that several schemas of data files share: numbers, lists of texts, lists of mappings."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from specs.errors import SpecRTError
from specs.yaml_loader import Scalar, YamlList, YamlMap, plain


def _number(node: Any) -> Any:
    value = node.value if isinstance(node, Scalar) else node
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _texts(node: Any) -> Any:
    """One text or a list of texts."""
    values = plain(node) if isinstance(node, Scalar | YamlList | YamlMap) else node
    values = values if isinstance(values, list | tuple) else [values]
    if not all(isinstance(value, str) for value in values):
        raise SpecRTError("SPEC-005", "expected text, or a list of texts", where=getattr(node, "where", None))
    return tuple(values)


def _numbers(node: Any) -> Any:
    """One whole number or a list of them."""
    values = plain(node) if isinstance(node, Scalar | YamlList | YamlMap) else node
    values = values if isinstance(values, list | tuple) else [values]
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        message = "expected a whole number, or a list of whole numbers"
        raise SpecRTError("SPEC-005", message, where=getattr(node, "where", None))
    return tuple(values)


def sequence(node: Any) -> Any:
    """A list of the file, as the tuple that a frozen schema holds."""
    if isinstance(node, YamlMap | Scalar):
        raise SpecRTError("SPEC-005", "expected a list", where=node.where)
    return tuple(node)


def _word(node: Any) -> Any:
    return node.value if isinstance(node, Scalar) else node


Word = BeforeValidator(_word)  # beside a Literal: one of a closed set of words
Float = Annotated[float, BeforeValidator(_number)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Numbers = Annotated[tuple[int, ...], BeforeValidator(_numbers)]
Sequence = BeforeValidator(sequence)
