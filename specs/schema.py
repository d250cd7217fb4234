"""The schema of an architecture file (specs/models/*.yaml) and `load_spec`, which reads and checks one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from specs.equations import OUTPUTS, Step, equations, parse_graph
from specs.errors import SpecRTError, Where
from specs.fields import Texts
from specs.node import Bool, BoolExpr, ExprList, Int, IntExpr, Node, Plain, Text, ValueExpr
from specs.parts import AnyPart, Part
from specs.yaml_loader import Scalar, YamlMap, load_yaml

SCHEMA_VERSION = 1


class Match(Node):
    """Which checkpoints the spec is for, told from their config.json."""

    title: ClassVar[str] = "`match`"
    model_type: Texts = Field(description="the value of `model_type`, or several")
    when: BoolExpr | None = Field(
        None, description="a condition on other keys; a key that may be absent is written `key | none`"
    )


class Ignore(Node):
    """What a checkpoint may hold that does not change the result."""

    title: ClassVar[str] = "`ignore`"
    config: Texts = Field((), description="keys of config.json")
    tensors: Texts = Field(
        (), description="names of tensors; `{i}` stands for any number, `{layers}` for a config name, `*` for anything"
    )


class WeightFrom(Node):
    """Where a weight lies in the checkpoint, when a plain module name does not say it."""

    title: ClassVar[str] = "`checkpoint` entry"
    source: Text | None = Field(
        None, alias="from", description="module name; its tensors are `<module>.weight` and `<module>.bias`"
    )
    weight: Text | None = Field(None, description="full name of the weight tensor, instead of `from`")
    bias: Text | None = Field(None, description="full name of the bias tensor")
    layout: Text | None = Field(
        None,
        description="how the rows of a fused tensor are made up, say `[q: heads, k: kv_heads, v: kv_heads] d_head`",
    )
    copies: IntExpr | None = Field(
        None, description="steps of the layout's first axis that hold the same rows of a piece, where we have them once"
    )
    transpose: Bool = Field(False, description="the tensor is stored [in, out], or [experts, in, out]")
    mxfp4: Text | None = Field(
        None, description="name without `_blocks` and `_scales` of an MXFP4 weight [..., out, in], where that exists"
    )

    @property
    def stacked(self) -> bool:
        """Whether it names one tensor for each index of the first axis; else one tensor holds them all."""
        return any("{e}" in name for name in (self.source, self.weight) if name is not None)


def _weight_from(node: Any) -> Any:
    if isinstance(node, Scalar):
        entry = YamlMap(node.where)
        entry["from"], entry.key_where["from"] = node, node.where
        return WeightFrom.model_validate(entry)
    return node


class Size(Node):
    """A published size: our config names and their values, and the number of parameters."""

    title: ClassVar[str] = "size"
    parameters: Int = Field(description="how many weights it has; checked against the shapes")
    values: dict[str, Plain]


def _size(node: Any) -> Any:
    """Splits `parameters` from the free names."""
    if not isinstance(node, YamlMap):
        return node
    inner, outer = YamlMap(node.where), YamlMap(node.where)
    for key, value in node.items():
        target = outer if key == "parameters" else inner
        target[key], target.key_where[key] = value, node.key_where[key]
    outer["values"], outer.key_where["values"] = inner, node.where
    return Size.model_validate(outer)


class Derive(Node):
    """How an input follows from a prompt's tokens, where the caller does not give it; one of these keys."""

    title: ClassVar[str] = "`derive` entry"
    first: ExprList | None = Field(
        None, description="the place of the first of these ids that occurs, tried in order; it is an error if none does"
    )
    has: IntExpr | None = Field(None, description="1 where the id occurs, else 0")
    fill: IntExpr | None = Field(None, description="the number, for each token")
    ordinals_without: IntExpr | None = Field(
        None, description="1, 2, ... for the tokens that are not this id, and 0 for those that are"
    )

    @model_validator(mode="after")
    def _one(self) -> Derive:
        if sum(getattr(self, key) is not None for key in ("first", "has", "fill", "ordinals_without")) != 1:
            hint = "its keys: " + ", ".join(f"`{key}`" for key in self.yaml_keys())
            raise SpecRTError("SPEC-005", "an entry of `derive` has one rule", where=self.where, hint=hint)
        return self

    def rule(self, env: Mapping[str, Any]) -> dict[str, int | list[int]]:
        """The rule as bundles have it, with ids in place of names."""
        if self.first is not None:
            return {"first": [expr.as_int(env) for expr in self.first]}
        return {key: expr.as_int(env) for key, expr, _ in self.expressions()}


class Spec(Node):
    """One architecture: its names, parts, wiring, weights and published sizes."""

    title: ClassVar[str] = "a spec"
    places: dict[tuple[str, ...], Where] = Field(exclude=True, repr=False)
    schema_version: Int = Field(alias="schema", description=f"version of this schema: {SCHEMA_VERSION}")
    name: Text = Field(description="short name of the architecture")
    match: Match = Field(description="which checkpoints it is for")
    source: dict[str, Text] = Field(description="where the facts come from: `paper`, `code`, ...")
    config: dict[str, ValueExpr] = Field(
        description="our names: an expression over keys of config.json and earlier names"
    )
    require: dict[str, Plain] = Field(
        {}, description="keys of config.json that, when present, must have this value (or one of a list)"
    )
    parts: dict[str, AnyPart] = Field(description="our name of each part: its kind and fields")
    graph: Annotated[tuple[Step, ...], PlainValidator(lambda steps: steps)] = Field(
        description="the wiring: equations, and `repeat COUNT:` with equations below it"
    )
    derive: dict[str, Derive] = Field(
        {}, description="inputs beside the tokens that follow from them: name and rule (below)"
    )
    spellings: dict[str, Text] = Field(
        {}, description="other spellings of tensor names, and ours: `.end`, `beginning.` or `.between.` dots"
    )
    checkpoint: dict[str, Annotated[WeightFrom, BeforeValidator(_weight_from)]] = Field(
        description="our weight: their module"
    )
    ignore: Ignore | None = Field(None, description="what a checkpoint may hold beside")
    sizes: dict[str, Annotated[Size, BeforeValidator(_size)]] = Field({}, description="published sizes by name")

    @property
    def outputs(self) -> tuple[str, ...]:
        """The results of the model, in the order of their equations."""
        found = (target for step in equations(self.graph) for target in step.targets if target in OUTPUTS)
        return tuple(dict.fromkeys(found))

    def key_where(self, *path: str) -> Where:
        """The place of a key of the file, say `key_where("parts", "attn")`."""
        return self.places.get(path, self.where)

    def part(self, name: str) -> Part:
        """The part of that name; it must exist (the graph was checked)."""
        return self.parts[name]

    def part_of_leaf(self, leaf: str) -> str:
        """`attn` for the leaf `attn.q`."""
        return leaf.split(".")[0]


def load_spec(path: str | Path) -> Spec:
    """Read and check one architecture file; raises SpecRTError SPEC-0xx with file:line:column."""
    return spec_of(load_yaml(path))


def spec_of(data: YamlMap) -> Spec:
    """The spec that a file's nodes are; raises SpecRTError SPEC-0xx as `load_spec`."""
    from specs.checks import check_spec

    version = data.get("schema")
    if isinstance(version, Scalar) and version.value != SCHEMA_VERSION:
        raise SpecRTError(
            "SPEC-007",
            f"this file is of schema {version.value}, this version of specrt reads schema {SCHEMA_VERSION}",
            where=version.where,
        )
    parts = data.get("parts")
    values: Any = data
    if "graph" in data and isinstance(parts, YamlMap):
        # The wiring can only be read with the part names known, so it is parsed before the schema looks at
        # it.
        values = YamlMap(data.where)
        values.update(data)
        values.key_where = data.key_where
        values["graph"] = parse_graph(data["graph"], set(parts))
    spec: Spec = Spec.model_validate(values)
    check_spec(spec)
    return spec
