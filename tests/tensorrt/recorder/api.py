"""The recorded API of a TensorRT version, and objects that have what it lists and nothing else."""

from __future__ import annotations

import json
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "data" / "tensorrt_api"
VERSIONS = ("8.6.0", "10.0.1", "10.3.0", "10.8.0", "10.16.1", "11.4.0")


class Api:
    """What one version has: members of classes, enumerators."""

    def __init__(self, version: str) -> None:
        content = json.loads((DATA / f"{version}.json").read_text(encoding="utf-8"))
        self.version: str = content["version"]
        self.classes: dict[str, dict[str, Any]] = content["classes"]
        self.enums = {name: IntEnum(name, names, start=0) for name, names in content["enums"].items()}  # type: ignore[misc]

    @property
    def strong_only(self) -> bool:
        return int(self.version.split(".")[0]) >= 11

    def check_call(self, owner: str, method: str, count: int) -> str:
        """The class that a call returns; raises TypeError as the real binding does where no overload has `count`."""
        variants = self.classes[owner][method]
        if variants == "=":
            raise TypeError(f"{owner}.{method} of TensorRT {self.version} is a property")
        for parameters, result in variants:
            needed = sum(not name.endswith("?") for name in parameters)
            if needed <= count <= len(parameters):
                return str(result)
        raise TypeError(f"{owner}.{method} of TensorRT {self.version} takes {variants}, got {count} arguments")


@cache
def api(version: str) -> Api:
    """The API of one of VERSIONS."""
    return Api(version)


class Guarded:
    """An object of a recorded class: members that the version lacks are AttributeErrors, as with the real binding."""

    def __init__(self, api: Api, owner: str) -> None:
        object.__setattr__(self, "_api", api)
        object.__setattr__(self, "_owner", owner)
        object.__setattr__(self, "_state", {})

    def __getattribute__(self, name: str) -> Any:
        get = object.__getattribute__
        if name.startswith("_") or name in get(self, "_hidden"):
            return get(self, name)
        api, owner = get(self, "_api"), get(self, "_owner")
        member = api.classes[owner].get(name)
        if member is None:
            raise AttributeError(f"TensorRT {api.version}: {owner} has no `{name}`")
        if member == "=":
            state = get(self, "_state")
            if name not in state:
                raise NotImplementedError(f"the recorder does not know {owner}.{name}")
            return state[name]
        try:
            method = get(self, name)
        except AttributeError:
            raise NotImplementedError(f"the recorder does not know {owner}.{name}") from None

        def call(*args: Any, **kwargs: Any) -> Any:
            api.check_call(owner, name, len(args) + len(kwargs))
            return method(*args, **kwargs)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        get = object.__getattribute__
        if name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        api, owner = get(self, "_api"), get(self, "_owner")
        if api.classes[owner].get(name) != "=":
            raise AttributeError(f"TensorRT {api.version}: {owner} has no property `{name}`")
        get(self, "_state")[name] = value

    _hidden: frozenset[str] = frozenset()  # members of the recorder itself
