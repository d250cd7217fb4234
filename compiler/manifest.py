"""What a bundle says of itself in bundle.json, before sizes and hashes of its files are added."""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.errors import SpecRTError, Where

if TYPE_CHECKING:
    from compiler.api import Prepared
    from compiler.ir import Graph
    from compiler.source import Source


def manifest_of(prepared: Prepared, toolchain: dict[str, str], text: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of bundle.json; `text`: what `compiler.text` copied into the bundle."""
    import specs

    asked, source = prepared.request, prepared.source
    spec_file = Path(source.spec.where.file)
    head = source.config.get("vocab")
    return {
        "specrt": specs.__version__,
        "name": source.label,
        "architecture": source.spec.name,
        "role": prepared.role,
        "target": asked.target,
        "precision": prepared.precision.recipe.name,
        "kv_cache": prepared.precision.recipe.kv_cache,
        "parameters": prepared.built.parameters,
        "vocab": head,
        "config": dict(source.config),
        "limits": {
            "max_batch": prepared.limits.batch,
            "max_sequence": prepared.limits.sequence,
        },
        "parallel": {"tensor": asked.tensor_parallel, "pipeline": asked.pipeline_parallel},
        "generation": _generation(source),
        "derive": derive_of(prepared),
        "bounds": _bounds(prepared.graph),
        **text,
        "toolchain": toolchain,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "source": {
            "spec": spec_file.name,
            "spec_sha256": hashlib.sha256(spec_file.read_bytes()).hexdigest(),
            "weights": asked.weights if source.checkpoint is None or asked.weights == "random" else source.label,
        },
        "gates": None if asked.card is None else dict(asked.card),
        "passes": [{"name": report.name, "hits": len(report.hits)} for report in prepared.reports],
    }


def derive_of(prepared: Prepared) -> dict[str, Any]:
    """How inputs of the graph follow from the tokens, by name; see runtime/derive.py."""
    names = {value.name for value in prepared.graph.inputs}
    rules = prepared.source.spec.derive
    return {name: entry.rule(prepared.source.config) for name, entry in rules.items() if name in names}


def _bounds(graph: Graph) -> dict[str, int]:
    """Inputs that choose rows of a table: how many rows there are."""
    from compiler.ir.core import walk

    inputs, found = set(graph.inputs), {}
    for equation in walk(graph.equations):
        if equation.op == "gather" and equation.values[1] in inputs:
            rows = equation.values[0].type.shape[0]
            if isinstance(rows, int):
                found[equation.values[1].name] = rows
    return found


def _generation(source: Source) -> dict[str, Any]:
    """Stop tokens of the checkpoint: `eos_token_id` of generation_config.json, else of config.json; and its beams.

    Raises SpecRTError CKPT-035 for keys of beam search that mean nothing.
    """
    import json

    if source.checkpoint is None:
        return {"stop": []}
    content, stated = dict(source.checkpoint.config), {}
    path = Path(source.checkpoint.dir) / "generation_config.json"
    if path.is_file():
        stated = json.loads(path.read_text(encoding="utf-8"))
        content.update(stated)
    stop = content.get("eos_token_id")
    return {"stop": stop if isinstance(stop, list) else [] if stop is None else [stop], **_beams(stated, path)}


def _beams(stated: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What generation_config.json says of beam search; with `do_sample` it means another one, which draws its beams."""
    if stated.get("do_sample"):
        return {}
    found = {name: stated[name] for name in _BEAMS if stated.get(name) is not None}
    for name, value in found.items():
        expected, accept = _BEAMS[name]
        if not accept(value):
            raise SpecRTError("CKPT-035", f"`{name}` is {value!r}, expected {expected}", where=Where(str(path)))
    return found


_BEAMS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # as runtime/beam_search.py takes them
    "num_beams": ("a whole number from 1 up", lambda value: type(value) is int and value >= 1),
    "length_penalty": ("a number", lambda value: type(value) in (int, float) and math.isfinite(value)),
    "early_stopping": ('true, false or "never"', lambda value: isinstance(value, bool) or value == "never"),
}
