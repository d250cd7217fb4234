"""Finding the spec of a checkpoint: the one whose `match:` holds for its config.json. There is no list in
code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specs.errors import SpecRTError, Where
from specs.names import nearest
from specs.schema import Match, Spec, load_spec
from specs.yaml_loader import YamlMap, load_yaml

SPECS_DIR = Path(__file__).parent / "models"


def spec_files(specs_dir: str | Path = SPECS_DIR) -> list[Path]:
    """The architecture files of a folder, sorted by name."""
    return sorted(Path(specs_dir).glob("*.yaml"))


def matches(match: Match, config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this architecture."""
    return config.get("model_type") in match.model_type and (match.when is None or match.when.as_bool(config))


def match_spec(config: Mapping[str, Any], where: Where | None = None, specs_dir: str | Path = SPECS_DIR) -> Spec:
    """The one spec of `specs_dir` for a config.json (`where` names it); raises SPEC-047 for none or several."""
    known: dict[str, list[Path]] = {}
    found: list[Path] = []
    for path in spec_files(specs_dir):
        match = _read_match(path)
        for name in match.model_type:
            known.setdefault(name, []).append(path)
        if matches(match, config):
            found.append(path)
    if len(found) == 1:
        return load_spec(found[0])
    model_type = config.get("model_type")
    if len(found) > 1:
        raise SpecRTError(
            "SPEC-047",
            f"several specs match `model_type: {model_type}`",
            where=where,
            notes=[str(path) for path in found],
            hint="give the spec file itself",
        )
    if model_type is None:
        raise SpecRTError(
            "SPEC-047",
            "config.json has no `model_type`, so no spec can be found for it",
            where=where,
            hint="give the spec file itself: `compile SPEC.yaml --checkpoint DIR`",
        )
    if model_type in known:
        notes = [f"{path} is for {_condition(path)}" for path in known[model_type]]
        raise SpecRTError(
            "SPEC-047",
            f"no spec for this variant of `model_type: {model_type}`",
            where=where,
            notes=notes,
            hint=f"{_infer(where)} drafts one for it",
        )
    close = nearest(str(model_type), known)
    listed = ", ".join(f"`{name}`" for name in sorted(known))
    raise SpecRTError(
        "SPEC-047",
        f"no spec for `model_type: {model_type}`",
        where=where,
        notes=(f"nearest: {', '.join(f'`{name}`' for name in close)}" if close else f"known: {listed}",),
        hint=f"a new architecture is one YAML file: {_infer(where)} drafts it, specs/REFERENCE.md explains it",
    )


def _infer(where: Where | None) -> str:
    return f"`specrt infer {Path(where.file).parent if where else 'CHECKPOINT'} --out NAME.yaml`"


def _read_match(path: Path) -> Match:
    """Only the `match:` block, so that finding a spec does not check all others."""
    data = load_yaml(path)
    block = data.get("match")
    if not isinstance(block, YamlMap):
        raise SpecRTError("SPEC-006", "a spec lacks the key `match`", where=data.where)
    return Match.model_validate(block)


def _condition(path: Path) -> str:
    when = _read_match(path).when
    return f"`{when.text}`" if when else "all of them"


def check_match(spec: Spec, config: Mapping[str, Any], where: Where) -> None:
    """A spec that the user named must be right for the checkpoint; raises SPEC-048."""
    model_type = config.get("model_type")
    if model_type not in spec.match.model_type:
        listed = " or ".join(f"`{name}`" for name in spec.match.model_type)
        raise SpecRTError(
            "SPEC-048",
            f"`{spec.name}` is for `model_type` {listed}, but the checkpoint says `{model_type}`",
            where=where,
            notes=(f"matched at {spec.match.where}",),
            hint="leave the spec out and let `match` find it",
        )
    if not matches(spec.match, config):
        assert spec.match.when is not None
        raise SpecRTError(
            "SPEC-048",
            f"`{spec.name}` is only for checkpoints with `{spec.match.when.text}`",
            where=where,
            notes=(f"matched at {spec.match.when.where}",),
            hint="leave the spec out and let `match` find it",
        )
