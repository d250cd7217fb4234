"""`infer`: the draft of a spec for an unknown architecture, from config.json and the names and shapes of its tensors.

What a checkpoint can't tell (how positions rotate, which activation, where norms stand) is taken from the words in
specs/infer_hints.yaml and marked `# CHECK:` in the draft; no weight is read.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from specs.errors import SpecRTError

if TYPE_CHECKING:
    from specs.checkpoint import Checkpoint


@dataclass(frozen=True)
class Check:
    """Something that the draft assumes: the line of the draft, what it is about, and what to look at."""

    line: int
    about: str
    text: str


@dataclass(frozen=True)
class Draft:
    """A spec that loads and whose weight map holds for the checkpoint it was drafted from."""

    name: str
    text: str
    checks: tuple[Check, ...]
    layers: int
    tensors: int
    ignored: tuple[str, ...]  # tensors that the draft leaves out because nothing told what they are
    parameters: int
    encoder: bool  # every token sees every other


def infer(folder: str | Path) -> Draft:
    """Draft a spec for a checkpoint; raises SPEC-080 where too little is recognised, SPEC-081 where the draft fails."""
    from compiler.infer.draft import write
    from compiler.infer.hints import load_hints
    from compiler.infer.structure import recognise
    from specs.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    if not isinstance(checkpoint.config.get("model_type"), str):
        raise SpecRTError(
            "SPEC-080",
            "cannot draft a spec: config.json has no `model_type`, by which a checkpoint finds its spec",
            where=checkpoint.config_where,
            hint="add one: any name that no other architecture has",
        )
    hints = load_hints()
    found = recognise(checkpoint, hints)
    name, text, checks = write(found, hints, checkpoint.config)
    parameters = _prove(text, checkpoint)
    return Draft(
        name, text, checks, found.layers, len(checkpoint.tensors), found.unknown, parameters, "mask: full" in text
    )


def _prove(text: str, checkpoint: Checkpoint) -> int:
    """Load the draft, build it and map every tensor; gives the number of parameters."""
    from compiler.frontend import build
    from specs.config import resolve_config
    from specs.match import check_match
    from specs.schema import load_spec
    from specs.weight_map import map_weights

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "draft.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            spec = load_spec(path)
            check_match(spec, checkpoint.config, checkpoint.config_where)
            config = resolve_config(spec, checkpoint.config, checkpoint.config_where)
            built = build(spec, config)
            map_weights(spec, config, built.weights, checkpoint)
        except SpecRTError as error:
            raise SpecRTError(
                "SPEC-081",
                "what was recognised does not make a spec of this checkpoint",
                where=checkpoint.config_where,
                notes=str(error).replace(str(path), "draft").splitlines(),
                hint="write the spec by hand (specs/REFERENCE.md), starting from the nearest of specs/models",
            ) from error
    return built.parameters
