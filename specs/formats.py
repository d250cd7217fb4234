"""Checkpoints of other toolchains (specs/formats/*.yaml): what a model's configuration and tensors are called there.

A model's spec stays one file; a format replaces its keys `config`, `require`, `parts` and `checkpoint`, node by node,
so that the result is checked as any spec and every message points to the file that said so.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from specs.errors import SpecRTError, Where
from specs.fields import Sequence, Texts
from specs.match import SPECS_DIR
from specs.names import nearest
from specs.node import BoolExpr, Int, Node, Text
from specs.schema import Spec, spec_of
from specs.yaml_loader import Scalar, YamlMap, load_yaml

VERSION = 1
FOLDER = Path(__file__).parent / "formats"
_RANKS = frozenset({"ranks", "copies"})  # what layouts of all models count with


class Cut(Node):
    """How modules are cut over ranks, by the ends of their names."""

    title: ClassVar[str] = "`ranks`"
    outputs: Texts = Field(description="modules of which each rank has some outputs")
    inputs: Texts = Field(description="modules of which each rank has some inputs")
    embeddings: Texts = Field(description="modules that are cut where the configuration says so")
    vocabulary: Texts = Field(description="modules with a row for each token, padded to a multiple of the ranks")


class Model(Node):
    """An architecture as the format names it, the spec it has, and keys of that spec that read otherwise."""

    title: ClassVar[str] = "an entry of `models`"
    architecture: Texts = Field(description="values of the format's key in config.json")
    when: BoolExpr | None = Field(None, description="a condition on other keys")
    spec: Text = Field(description="the architecture's file, without .yaml")
    config: Any = Field(None, description="our names over the format's keys; null: not needed")
    require: Any = Field(None, description="as in a spec; null: not required of this one")
    parts: Any = Field(None, description="parts that differ")
    spellings: Any = Field(None, description="as in a spec")
    checkpoint: Any = Field(None, description="our weight: their module; null: not there")


class Format(Node):
    """One toolchain's checkpoints."""

    title: ClassVar[str] = "a checkpoint format"
    format: Int = Field(description=f"version of this schema: {VERSION}")
    name: Text = Field(description="the file's name")
    source: dict[str, Text] = Field(description="where the facts come from")
    key: Text = Field(description="the key of config.json that names the architecture")
    config: Any = Field(description="our names over the format's keys")
    require: Any = Field(description="as in a spec, for all models")
    checkpoint: Any = Field(description="our weight: their module, for all models that have the part")
    mlp: Any = Field(description="the same for a plain `mlp`")
    gated: Any = Field(description="the same for a `gated_mlp`")
    ranks: Cut = Field(description="how tensor parallelism cut modules")
    ignore: Any = Field(description="as in a spec")
    models: Annotated[tuple[Model, ...], Sequence] = Field(description="the architectures")


@lru_cache
def formats() -> tuple[Format, ...]:
    """The formats that come with SpecRT, by name."""
    return tuple(Format.model_validate(load_yaml(path)) for path in sorted(FOLDER.glob("*.yaml")))


def format_of(config: Mapping[str, Any]) -> Format | None:
    """The format of a config.json, or None for one that names a `model_type` and its architecture otherwise."""
    return next((found for found in formats() if isinstance(config.get(found.key), str)), None)


def spec_in(found: Format, config: Mapping[str, Any], where: Where) -> Spec:
    """The spec of a checkpoint in a format, read as that format says; raises SPEC-047 where there is none."""
    named = config[found.key]
    fitting = [model for model in found.models if named in model.architecture]
    for model in fitting:
        if model.when is None or model.when.as_bool(config):
            return spec_of(_overlaid(found, model))
    known = sorted({name for model in found.models for name in model.architecture})
    close = nearest(str(named), known)
    raise SpecRTError(
        "SPEC-047",
        f"no spec for `{found.key}: {named}` of {found.name} checkpoints"
        + ("" if not fitting else f" unless `{' or '.join(m.when.text for m in fitting if m.when)}`"),
        where=where,
        notes=(f"nearest: {', '.join(f'`{name}`' for name in close)}" if close else f"known: {', '.join(known)}",),
        hint=f"add it to {Path(found.where.file).name}, or convert the checkpoint that it was made from",
    )


def _overlaid(found: Format, model: Model) -> YamlMap:
    """A spec's file with the keys that the format reads otherwise."""
    data = load_yaml(SPECS_DIR / f"{model.spec}.yaml")
    parts = _over(_map(data, "parts"), model.parts)
    gated = _kind(parts.get("mlp")) == "gated_mlp"
    modules = _over(_over(found.checkpoint, found.gated if gated else found.mlp), model.checkpoint)
    own = {*parts, *(model.checkpoint or ())}
    named = {key: node for key, node in modules.items() if {key, key.split(".")[0]} & own and not _null(node)}
    required = _over(found.require, model.require)
    replaced: dict[str, Any] = {
        "parts": parts,
        "config": _config(_map(data, "config"), found.config, model.config),
        "require": _picked(required, {key: node for key, node in required.items() if not _null(node)}),
        "ignore": found.ignore,
        "spellings": model.spellings,
        "checkpoint": _picked(modules, named),
    }
    result = YamlMap(data.where)
    for key in dict.fromkeys((*data, *replaced)):
        if key == "sizes" or replaced.get(key, data.get(key)) is None:
            continue
        result[key] = replaced[key] if key in replaced else data[key]
        result.key_where[key] = data.key_where.get(key, data.where)
    return result


def _config(own: YamlMap, shared: YamlMap, special: YamlMap | None) -> YamlMap:
    """The spec's names in their order, by the model's expression, the format's or its own; then what these add."""
    result = YamlMap(own.where)
    further = [*(name for name in shared if name in _RANKS), *(special or ())]
    for name in dict.fromkeys((*own, *further)):
        layers = [layer for layer in (special, shared, own) if layer is not None and name in layer]
        node = layers[0][name]
        if not _null(node):
            result[name], result.key_where[name] = node, layers[0].key_where[name]
    return result


def _null(node: Any) -> bool:
    return isinstance(node, Scalar) and node.value is None


def _over(below: YamlMap, above: YamlMap | None) -> YamlMap:
    return below if above is None else _picked(below, {**below, **above}, above)


def _picked(like: YamlMap, nodes: Mapping[str, Any], above: YamlMap | None = None) -> YamlMap:
    result = YamlMap(like.where)
    for key, node in nodes.items():
        result[key] = node
        result.key_where[key] = above.key_where[key] if above is not None and key in above else like.key_where[key]
    return result


def _map(data: YamlMap, key: str) -> YamlMap:
    node = data[key]
    assert isinstance(node, YamlMap)  # specs that come with SpecRT, which their own tests read
    return node


def _kind(part: Any) -> Any:
    kind = part.get("kind") if isinstance(part, YamlMap) else None
    return kind.value if isinstance(kind, Scalar) else None
