"""Nodes that a spec chooses by their `kind` key, out of a closed union."""

from __future__ import annotations

from typing import Any

from pydantic import PlainValidator

from specs.errors import SpecRTError
from specs.names import did_you_mean
from specs.node import Node, Text
from specs.yaml_loader import Scalar, YamlMap


class Kind(Node):
    """A node chosen by its `kind` key."""

    kind: Text

    @classmethod
    def kind_name(cls) -> str:
        """What a spec writes for it."""
        return str(cls.model_fields["kind"].default)


def pick(what: str, classes: tuple[type[Kind], ...]) -> PlainValidator:
    """A validator that reads a mapping as the class that its `kind` names; SPEC-005, SPEC-006, SPEC-015 for others."""
    kinds = {cls.kind_name(): cls for cls in classes}

    def picked(data: Any) -> Any:
        if isinstance(data, Kind):
            return data
        if not isinstance(data, YamlMap):
            raise SpecRTError(
                "SPEC-005",
                f"expected a mapping with a `kind` for a {what}",
                where=getattr(data, "where", None),
            )
        kind = data.get("kind")
        if not isinstance(kind, Scalar):
            raise SpecRTError(
                "SPEC-006",
                f"{what} lacks the key `kind`",
                where=data.where,
                hint="known: " + ", ".join(f"`{name}`" for name in kinds),
            )
        if kind.value not in kinds:
            raise SpecRTError(
                "SPEC-015",
                f"unknown {what} kind `{kind.value}`",
                where=kind.where,
                hint=did_you_mean(str(kind.value), kinds),
            )
        return kinds[str(kind.value)].model_validate(data)

    return PlainValidator(picked)
