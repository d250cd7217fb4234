"""From a checkpoint's config.json to our names, with every key of it accounted for."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from specs.errors import SpecRTError, Where
from specs.expressions import Expr, Missing, dotted, evaluate, lookup, show
from specs.functions import CONSTANTS, Value
from specs.names import did_you_mean
from specs.schema import Size, Spec
from specs.yaml_loader import load_yaml, plain

TENSORS = "tensors"
"""In `config:`, the shapes of the checkpoint's tensors by name."""
Resolved = dict[str, Any]
"""Our config names and their values: int, float, bool, str, None, list or dict."""


def resolve_config(
    spec: Spec, config: Mapping[str, Any], where: Where, tensors: Mapping[str, Sequence[int]] | None = None
) -> Resolved:
    """Evaluate `config:` over a config.json; `where` names that file, `tensors` are the checkpoint's shapes by name;
    raises SPEC-040 to SPEC-043.
    """
    _check_required(spec, config, where)
    resolved: Resolved = {}
    known = config if tensors is None else {**config, TENSORS: tensors}
    for name, expr in spec.config.items():
        # Our earlier names come first; all others are keys of config.json.
        env = _Layers(resolved, known)
        _check_agreement(expr, env, where)
        resolved[name] = _evaluate(name, expr, env, where)
        _check_range(spec, name, resolved[name], where)
    _check_covered(spec, config, where)
    _check_groups(resolved, where)
    return resolved


def resolve_size(spec: Spec, name: str) -> Resolved:
    """The config of a published size: what the size gives, and for the rest what `config:` falls back to;
    raises SPEC-044, SPEC-045.
    """
    size = find_size(spec, name)
    resolved: Resolved = {}
    for key, expr in spec.config.items():
        if key in size.values:
            resolved[key] = size.values[key]
            continue
        try:
            resolved[key] = evaluate(expr, _Layers(resolved, {}))
        except SpecRTError as error:
            if error.code != "SPEC-011":
                raise
            raise SpecRTError(
                "SPEC-045",
                f"size `{name}` must give `{key}`",
                where=size.where,
                hint=f"`{expr.text}` has no value without a config.json",
            ) from error
    for key, value in resolved.items():
        _check_range(spec, key, value, size.where)
    _check_groups(resolved, size.where)
    return resolved


def find_size(spec: Spec, name: str) -> Size:
    """The size of that name; raises SPEC-044."""
    if name not in spec.sizes:
        raise SpecRTError(
            "SPEC-044",
            f"`{spec.name}` has no size `{name}`",
            where=spec.key_where("sizes"),
            hint=did_you_mean(name, spec.sizes),
        )
    return spec.sizes[name]


class _Layers(dict[str, Any]):
    """Our names over theirs."""

    def __init__(self, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
        super().__init__({**theirs, **ours})
        self.ours = frozenset(ours)


def _evaluate(name: str, expr: Expr, env: _Layers, where: Where) -> Value:
    try:
        return evaluate(expr, env)
    except SpecRTError as error:
        if error.code != "SPEC-011":
            raise
        raise SpecRTError(
            "SPEC-040",
            f"{where.file} does not give `{name}`, which is read from `{expr.text}`",
            where=expr.where,
            hint=error.hint,
        ) from error


def _alternatives(tree: ast.expr) -> list[ast.expr]:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitOr):
        return [*_alternatives(tree.left), *_alternatives(tree.right)]
    return [tree]


def _check_agreement(expr: Expr, env: _Layers, where: Where) -> None:
    """Two spellings of one fact, both present, must agree: none of them may be ignored."""
    present: dict[str, Value] = {}
    for tree in _alternatives(expr.tree):
        path = dotted(tree)
        if path is None or path in CONSTANTS or path.split(".")[0] in env.ours:
            continue
        value = lookup(path, env)
        if value is not None and not isinstance(value, Missing):
            present[path] = value
    if any(value != other for value in present.values() for other in present.values()):
        said = ", ".join(f"`{path}` is {show(value)}" for path, value in present.items())
        raise SpecRTError(
            "SPEC-041",
            f"{where.file} contradicts itself: {said}",
            where=where,
            notes=(f"both are read at {expr.where}",),
            hint="keep the one that the model was trained with",
        )


def _check_required(spec: Spec, config: Mapping[str, Any], where: Where) -> None:
    for path, expected in spec.require.items():
        value = lookup(path, config)
        if isinstance(value, Missing) or value is None:
            continue
        allowed = expected if isinstance(expected, list) else [expected]
        if value not in allowed:
            raise SpecRTError(
                "SPEC-042",
                f"{where.file} has `{path}: {show(value)}`, but `{spec.name}` is only right for "
                + " or ".join(show(item) for item in allowed),
                where=where,
                notes=(f"required at {spec.key_where('require', path)}",),
                hint=f"to cover other values, read `{path}` in `config` and use it where the model does",
            )


# ---- coverage ----------------------------------------------------------------------------------------------


@lru_cache
def ignored_keys() -> dict[str, frozenset[str]]:
    """Keys of config.json that never change a result, by reason (specs/config_ignored.yaml)."""
    data = plain(load_yaml(Path(__file__).with_name("config_ignored.yaml")))
    assert isinstance(data, dict)
    return {reason: frozenset(keys) for reason, keys in data.items()}


def _read_paths(spec: Spec) -> set[str]:
    """Every path of config.json that the spec reads, requires, matches on or lists as ignored."""
    exprs = [*spec.config.values(), *([spec.match.when] if spec.match.when else [])]
    paths = {path for expr in exprs for path in expr.names()}
    ignored = spec.ignore.config if spec.ignore else ()
    return paths | set(spec.require) | set(ignored) | {"model_type"}


def _check_covered(spec: Spec, config: Mapping[str, Any], where: Where) -> None:
    groups = ignored_keys()
    by_name = groups["named_only"]
    ignored = {key for group, keys in groups.items() if group != "named_only" for key in keys}
    # A part of config.json that is a config of its own repeats such keys; `top_k` there may be anything.
    nested = frozenset(ignored - groups["generation"])
    for path, value in _uncovered(config, _read_paths(spec) | ignored, by_name, nested):
        raise SpecRTError(
            "SPEC-043",
            f"{where.file} has `{path}: {show(value)}`, which `{spec.name}` does not cover",
            where=where,
            notes=(f"the spec is {spec.where.file}",),
            hint="it may change the result: read it in `config` and use it, or list it under `ignore` if it never "
            "does, under `require` if only this value is right",
        )


def _uncovered(
    config: Mapping[str, Any], known: set[str], by_name: frozenset[str], nested: frozenset[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Paths with a value that is switched on and that nothing reads. A mapping read whole covers its keys,
    except those in `by_name`; keys in `nested` never matter inside of one.
    """
    for key, value in config.items():
        path = f"{prefix}{key}"
        if not value or (prefix and key in nested):
            continue
        if isinstance(value, Mapping):
            inner = known
            if path in known:
                inner = known | {f"{path}.{name}" for name in value if name not in by_name}
            elif not any(name.startswith(f"{path}.") for name in known):
                yield path, value
                continue
            yield from _uncovered(value, inner, by_name, nested, f"{path}.")
        elif path not in known:
            yield path, value


DIMENSIONS = frozenset({"d_model", "layers", "heads", "kv_heads", "d_head", "d_ffn", "vocab", "context"})


def _check_range(spec: Spec, name: str, value: Value, where: Where) -> None:
    """Dimensions are whole numbers above 0."""
    if name not in DIMENSIONS or value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise SpecRTError(
            "SPEC-046",
            f"`{name}` is {show(value)}, but must be a whole number above 0",
            where=where,
            notes=(f"computed by `{spec.config[name].text}` at {spec.config[name].where}",),
        )


def _check_groups(resolved: Resolved, where: Where) -> None:
    """Query heads divide evenly among the key and value heads."""
    heads, kv_heads = resolved.get("heads"), resolved.get("kv_heads")
    if isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads:
        message = f"`heads` is {heads}, which is not a multiple of `kv_heads`, {kv_heads}"
        raise SpecRTError("SPEC-046", message, where=where)
