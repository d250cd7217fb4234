"""The plan as the runtime sees it: typed ports, steps in order, and the layout of the KV cache. Read from plan.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from specs.errors import SpecRTError, Where

BYTES = {"f32": 4, "bf16": 2, "f16": 2, "u8": 1, "i8": 1, "i32": 4, "bool": 1}  # of one element


@dataclass(frozen=True)
class Port:
    """An input or output of the model; a dim is a number or a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Step:
    """One call of an engine or a program of kernels (`file`), or of a kernel (`name`, `attrs`).

    Ports are bound to values or to `weight:NAME`.
    """

    kind: str
    backend: str
    file: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    config: Mapping[str, str]
    name: str = ""
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheLayer:
    """The caches of one attention: k [C, heads, block_size, dim] and v [C, heads, block_size, value_dim]."""

    k: str
    v: str
    heads: int
    dim: int
    value_dim: int
    dtype: str


@dataclass(frozen=True)
class CacheLayout:
    """The KV cache of all layers; in a `linear` one a block is the whole row of places of a sequence."""

    block_size: int
    layers: tuple[CacheLayer, ...]
    kind: str = "paged"

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return sum(self.bytes_of(layer, layer.dim) + self.bytes_of(layer, layer.value_dim) for layer in self.layers)

    def bytes_of(self, layer: CacheLayer, width: int) -> int:
        """Bytes of one block in one cache of a layer, whose rows have so many elements."""
        return self.block_size * layer.heads * width * BYTES[layer.dtype]


@dataclass(frozen=True)
class StoredWeight:
    """A tensor of the bundle and the safetensors file that holds it under its name, in so many bytes.

    No file: `random` says how the device makes it (docs/gpu-plan.md).
    """

    dtype: str
    shape: tuple[int, ...]
    file: str | None
    bytes: int
    random: Mapping[str, Any] = field(default_factory=dict)


Ranges = Mapping[str, tuple[int, int, int]]  # of named dims: (lo, opt, hi)


@dataclass(frozen=True)
class Program:
    """What an executable runs; what a device needs beside (docs/gpu-plan.md) is empty in a plan for the CPU."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    values: Mapping[str, str]
    steps: tuple[Step, ...]
    dims: Ranges
    cache: CacheLayout | None
    types: Mapping[str, Port] = field(default_factory=dict)
    weights: Mapping[str, StoredWeight] = field(default_factory=dict)
    profiles: tuple[Ranges, ...] = ()
    build: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[int, ...] = (0,)  # the first step of each stage of a pipeline
    first: int = 0  # of the plan's steps, the one that is first here
    received: tuple[str, ...] = ()  # values that the stage before hands on
    sent: tuple[str, ...] = ()  # and those for the next


def read_program(path: Path) -> tuple[dict[str, Any], Program]:
    """The JSON of a plan and the same typed. Raises SpecRTError BUNDLE-008 where it is not what this runtime knows."""
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        return plan, _program(plan)
    except json.JSONDecodeError as error:
        raise _bad(path, error.msg) from error
    except KeyError as error:
        raise _bad(path, f"key {error} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise _bad(path, str(error)) from error


def _bad(path: Path, reason: str) -> SpecRTError:
    hint = "compile the bundle again: `specrt compile SOURCE --out BUNDLE`"
    return SpecRTError("BUNDLE-008", f"{path.name} is not a plan: {reason}", where=Where(str(path)), hint=hint)


def _program(plan: Mapping[str, Any]) -> Program:
    cache = None
    if plan["cache"] is not None:
        layers = tuple(CacheLayer(**layer) for layer in plan["cache"]["layers"])
        if unknown := {layer.dtype for layer in layers} - set(BYTES):
            raise ValueError(f"cache of unknown type {', '.join(sorted(unknown))}")
        if (kind := plan["cache"].get("kind", "paged")) not in ("paged", "linear"):
            raise ValueError(f"unknown kind of cache `{kind}`")
        cache = CacheLayout(int(plan["cache"]["block_size"]), layers, kind)
    return Program(
        inputs=_ports(plan["inputs"]),
        outputs=_ports(plan["output_types"]),
        values=dict(plan["outputs"]),
        steps=tuple(Step(**step) for step in plan["steps"]),
        dims=_ranges(plan["dims"]),
        cache=cache,
        types={
            name: Port(name, value["dtype"], tuple(value["shape"])) for name, value in plan.get("values", {}).items()
        },
        weights={
            name: StoredWeight(
                item["dtype"], tuple(item["shape"]), item["file"], int(item["bytes"]), item.get("random") or {}
            )
            for name, item in plan.get("weights", {}).items()
        },
        profiles=tuple(_ranges(profile) for profile in plan.get("profiles", ())),
        build=dict(plan.get("build", {})),
        stages=_stages(plan),
    )


def _stages(plan: Mapping[str, Any]) -> tuple[int, ...]:
    found = tuple(int(step) for step in plan.get("stages") or (0,))
    if found[0] != 0 or any(first >= end for first, end in zip(found, (*found[1:], len(plan["steps"])), strict=True)):
        raise ValueError(f"stages of a pipeline begin at steps {', '.join(map(str, found))}")
    return found


def stage_of(program: Program, stage: int) -> Program:
    """What one stage of a pipeline runs: its steps, with their weights and caches, and the values that pass it.

    Inputs of the model are those of every stage, its outputs those of the last.
    """
    if len(program.stages) == 1:
        return program
    first, end = (*program.stages, len(program.steps))[stage : stage + 2]
    last = end == len(program.steps)
    steps = program.steps[first:end]
    bound = {name for step in steps for name in (*step.inputs.values(), *step.outputs.values())}
    cache = program.cache
    if cache is not None:
        own = {step.attrs["k_cache"] for step in steps if "k_cache" in step.attrs}
        cache = replace(cache, layers=tuple(layer for layer in cache.layers if layer.k in own))
    return replace(
        program, steps=steps, first=first, cache=cache, received=_crossing(program, first), stages=(0,),
        sent=() if last else _crossing(program, end),
        outputs=program.outputs if last else (), values=program.values if last else {},
        weights={name: weight for name, weight in program.weights.items() if f"weight:{name}" in bound},
    )  # fmt: skip


def _crossing(program: Program, step: int) -> tuple[str, ...]:
    """Values that are made before a step and read from it on, in the order in which they are made."""
    made = dict.fromkeys(name for one in program.steps[:step] for name in one.outputs.values())
    read = {name for one in program.steps[step:] for name in one.inputs.values()} | set(program.values.values())
    return tuple(name for name in made if name in read)


def _ranges(entries: Any) -> Ranges:
    return {name: (int(lo), int(opt), int(hi)) for name, (lo, opt, hi) in entries.items()}


def _ports(entries: Any) -> tuple[Port, ...]:
    return tuple(Port(entry["name"], entry["dtype"], tuple(entry["shape"])) for entry in entries)
