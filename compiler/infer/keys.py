"""Which keys of config.json the draft reads, and what becomes of the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from compiler.infer.hints import Hints
from specs.config import ignored_keys


class Keys:
    """Collects `config` and `require` lines while parts are written."""

    def __init__(self, config: dict[str, Any], hints: Hints) -> None:
        self.config, self.hints = config, hints
        self.names: dict[str, tuple[str, list[str]]] = {}
        self.require: dict[str, Any] = {}
        self._read = {"model_type"}

    def read(self, path: str) -> str:
        """Note that the draft reads a key."""
        self._read.add(path)
        return path

    def value(self, path: str) -> Any:
        """What config.json has there; None where it has nothing."""
        value: Any = self.config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def has(self, path: str) -> bool:
        """Whether the key is there and says something."""
        return self.value(path) is not None

    def first(self, name: str) -> str | None:
        """The first key in config.json that the hints list for one of our names."""
        key = next((key for key in self.hints.config[name] if self.has(key)), None)
        return None if key is None else self.read(key)

    def fixed(self, name: str, expr: str, check: str | None = None) -> None:
        """A name of ours with its expression."""
        self.names.setdefault(name, (expr, [check] if check else []))

    def size(self, name: str, known: dict[str, int], fallback: str | None) -> tuple[str, list[str]]:
        """The expression for a size that shapes have told: a key with that value, else a formula, else the number."""
        from specs.errors import Where
        from specs.expressions import parse_expr

        value = known[name]
        fits = fallback is not None and parse_expr(fallback, Where("draft")).as_int(known) == value
        here = [key for key in self.hints.config[name] if self.has(key)]
        key = next((key for key in here if self.config[key] == value), None)
        if key is not None:
            return (f"{self.read(key)} | {fallback}" if fits else self.read(key)), []
        if fits and fallback is not None and not here:
            return fallback, []
        said = ", ".join(f"`{one}: {self.config[one]}`" for one in here)
        said = f"config.json has {said}" if said else "no key of config.json gives it"
        return str(value), [f"the shapes say {value}; {said}"]

    def unread(self) -> dict[str, Any]:
        """Keys that are switched on and read by nothing: the draft is right, if at all, for these values only."""
        groups = ignored_keys()
        never = frozenset().union(*(keys for group, keys in groups.items() if group != "named_only"))
        return dict(self._unread(self.config, "", never, groups["named_only"]))

    def _unread(
        self, config: dict[str, Any], prefix: str, never: frozenset[str], named: frozenset[str]
    ) -> Iterator[tuple[str, Any]]:
        known = self._read | set(self.require)
        for key, value in config.items():
            path = f"{prefix}{key}"
            if not value or path in never:
                continue
            if isinstance(value, dict):
                if path in known:  # read whole, except what must be read by its own path
                    yield from (
                        (f"{path}.{k}", v) for k, v in value.items() if k in named and f"{path}.{k}" not in known
                    )
                elif any(name.startswith(f"{path}.") for name in known):
                    yield from self._unread(value, f"{path}.", never, named)
                else:
                    yield path, value
            elif path not in known:
                yield path, value
