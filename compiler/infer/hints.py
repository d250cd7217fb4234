"""The words that `infer` goes by, read from specs/infer_hints.yaml."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import specs
from specs.yaml_loader import load_yaml, plain

FILE = Path(specs.__file__).parent / "infer_hints.yaml"


@dataclass(frozen=True)
class Hints:
    """The file's content by its top keys."""

    layer: dict[str, list[str]]
    fused_qkv: dict[str, str]
    blocks: str
    norms: list[dict[str, Any]]
    wirings: dict[str, list[str]]
    parallel_keys: list[str]
    outside: dict[str, list[str]]
    buffers: list[str]
    experts: list[str]
    config: dict[str, list[str]]
    rms_eps_keys: list[str]
    layer_eps_keys: list[str]
    act_keys: list[str]
    rope: dict[str, list[str]]
    alibi: list[str]
    window: list[str]
    window_switches: list[str]
    causal_words: list[str]


@lru_cache
def load_hints() -> Hints:
    """The hints; the file is ours, so a missing or unknown key is a bug."""
    content: Any = plain(load_yaml(FILE))
    return Hints(**content)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether the end of a dotted name matches one of the patterns, part by part."""
    parts = name.lower().split(".")
    for pattern in patterns:
        wanted = pattern.split(".")
        tail = parts[-len(wanted) :]
        if len(tail) == len(wanted) and all(map(fnmatchcase, tail, wanted)):
            return True
    return False
