"""What turns text and conversations into tokens goes into the bundle: tokenizer.json and the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specs.errors import SpecRTError, Where

if TYPE_CHECKING:
    from specs.checkpoint import Checkpoint

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def copy_text(checkpoint: Checkpoint | None, work: Path) -> dict[str, Any]:
    """Copy both as far as the checkpoint has them; gives their keys of bundle.json, None for what it lacks.

    Raises SpecRTError CKPT-036 for a tokenizer_config.json that is no JSON, or whose template is no text.
    """
    found: dict[str, Any] = {"tokenizer": None, "chat": None}
    if checkpoint is None:
        return found
    folder = Path(checkpoint.dir)
    if (path := folder / TOKENIZER).is_file():
        (work / TOKENIZER).write_bytes(path.read_bytes())
        found["tokenizer"] = TOKENIZER
    settings = _settings(folder / "tokenizer_config.json")
    template = _template(folder, settings)
    if template is not None:
        (work / TEMPLATE).write_text(template, encoding="utf-8", newline="")
        named = {name: _token(settings.get(name)) for name in _TOKENS}
        tokens = {name: token for name, token in named.items() if token is not None}
        found["chat"] = {"template": TEMPLATE, "tokens": tokens}
    return found


def _settings(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SpecRTError(
            "CKPT-036", f"tokenizer_config.json can't be read: {error}", where=Where(str(path))
        ) from error
    if not isinstance(content, dict):
        message = f"tokenizer_config.json is {type(content).__name__}, expected an object"
        raise SpecRTError("CKPT-036", message, where=Where(str(path)))
    return content


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """A file of its own goes before the key, as in transformers; of several named ones the default."""
    if (path := folder / TEMPLATE).is_file():
        return path.read_text(encoding="utf-8")
    stated = settings.get("chat_template")
    if isinstance(stated, list):
        named = {entry.get("name"): entry.get("template") for entry in stated if isinstance(entry, dict)}
        stated = named.get("default")
    if stated is None or isinstance(stated, str):
        return stated
    message = f"`chat_template` is {repr(stated)[:60]}, expected text, or a list of named texts"
    raise SpecRTError("CKPT-036", message, where=Where(str(folder / "tokenizer_config.json")))


def _token(stated: object) -> str | None:
    """A special token as tokenizer_config.json writes it: text, or an object with the text."""
    content = stated.get("content") if isinstance(stated, dict) else stated
    return content if isinstance(content, str) else None
