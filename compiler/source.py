"""What the user names (architecture file, checkpoint folder, deployment spec) -> spec, configuration and checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.errors import SpecRTError

if TYPE_CHECKING:
    from specs.checkpoint import Checkpoint
    from specs.schema import Spec


@dataclass(frozen=True)
class Source:
    """A spec with the values of its `config:` names, and the checkpoint to take weights from, if any."""

    spec: Spec
    config: Mapping[str, Any]
    checkpoint: Checkpoint | None
    label: str
    parameters: int | None  # published count, where a size was named


def resolve(source: str | Path, checkpoint: str | Path | None, size: str | None) -> Source:
    """Find the spec and its configuration.

    Raises SpecRTError SPEC-xxx for a wrong spec, CKPT-xxx for a wrong checkpoint, and SPEC-066 where neither a
    checkpoint nor a size says how large the model is.
    """
    from specs.archive import is_archive
    from specs.checkpoint import Checkpoint
    from specs.config import resolve_config, resolve_size
    from specs.formats import format_of, spec_in
    from specs.match import check_match, match_spec
    from specs.schema import load_spec
    from specs.spellings import respelled

    path = Path(source)
    if not path.exists():
        hint = "give an architecture file (specs/models/*.yaml), a deployment spec, or a checkpoint folder or archive"
        raise SpecRTError("SPEC-067", f"`{path}` does not exist", hint=hint)
    if path.is_dir() or is_archive(path):
        if checkpoint is not None:
            message = f"`{path}` is a checkpoint, and another is given too"
            raise SpecRTError("SPEC-067", message, hint="give one of them")
        checkpoint = path
    opened = Checkpoint.open(Path(checkpoint)) if checkpoint is not None else None
    if opened is not None:
        named = path.is_file() and path != checkpoint
        form = format_of(opened.config)
        if form is not None:
            if named:
                hint = f"name the folder alone: `compile {checkpoint}`"
                raise SpecRTError("SPEC-067", f"a {form.name} checkpoint tells its architecture itself", hint=hint)
            spec = spec_in(form, opened.config, opened.config_where)
        else:
            spec = load_spec(path) if named else match_spec(opened.config, where=opened.config_where)
            check_match(spec, opened.config, opened.config_where)
        if size is not None:
            raise SpecRTError("SPEC-066", "a checkpoint has its own size", hint=f"leave out `--size {size}`")
        opened = respelled(spec, opened)
        shapes = {name: list(info.shape) for name, info in opened.tensors.items()}
        config = resolve_config(spec, opened.config, opened.config_where, shapes)
        place = Path(str(checkpoint)).resolve()
        return Source(spec, config, opened, place.name if place.is_dir() else place.stem, None)
    spec = load_spec(path)
    if size is None:
        known = ", ".join(spec.sizes) or "none"
        message = f"`{path}` describes an architecture: name a checkpoint, or a size and `--weights random`"
        raise SpecRTError("SPEC-066", message, hint=f"sizes: {known}")
    return Source(spec, resolve_size(spec, size), None, f"{spec.name}-{size}", spec.sizes[size].parameters)
