"""The kernels of a plan: which its steps need, compiled into the bundle's `kernels/` with kernels.json.

kernels.json: `format` says what the runtime must be able to launch, `kernels` is key -> {arguments, constants, sm90:
{file, entry, threads, shared, overlap}, ...}, and all else names keys: `sets` is, for an architecture, a list of name
-> key, one for each attention that differs; `attention` maps the index of a step to its set; `programs` maps an
architecture and a segment to its kernels, by rows at most; `others` are by name: `choose` picks tokens, `carry` hands
them to the next step, `all_reduce.DTYPE` adds up values of ranks, `normal.DTYPE.MEAN` and `codes.AND.OR` make weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from math import gcd
from pathlib import Path
from typing import Any

from compiler.ir.parser import parse
from compiler.kernels import attention as lib
from compiler.kernels.build import build
from compiler.kernels.products import IN_WORDS
from compiler.kernels.row_source import RefusedError
from compiler.kernels.rows import SIZES, Program, as_dict, program_of

FOLDER = "kernels"
REDUCE = "all_reduce."  # and a type
FORMAT = 2  # as runtime/cuda/kernels.py reads it
PROMPT = 64  # rows: a prompt is padded to these, or to more (runtime/cuda/batch.py)
_LOG = logging.getLogger("compiler.kernels")
FLOATS = ("f32", "f16", "bf16")


def attention_of(plan: Mapping[str, Any], step: Mapping[str, Any]) -> lib.Attention:
    """The attention that a kernel step of a plan (docs/gpu-plan.md) asks for."""
    attrs, values = step["attrs"], plan["values"]
    cache = next(layer for layer in plan["cache"]["layers"] if layer["k"] == attrs["k_cache"])
    rotary = attrs["rotary"]
    q, k, v = ((attrs[name]["offset"], attrs[name]["row"], attrs[name]["head"]) for name in ("q", "k", "v"))
    return lib.Attention(
        dtype=values[step["inputs"]["q"]]["dtype"], cache_dtype=cache["dtype"], heads=attrs["heads"],
        groups=attrs["kv_heads"], dim=attrs["d_head"], wide=attrs["d_value"], block=plan["cache"]["block_size"],
        scale=attrs["scale"], causal=attrs["causal"], q=q, k=k, v=v, pairs=rotary["pairs"] if rotary else 0,
        style=rotary["style"] if rotary else "half", window=attrs["window"], softcap=attrs["softcap"],
        slopes=attrs["slopes"] is not None, bf16_bias=attrs["bf16_bias"],
        codes=attrs["codes"], prefix="prefix" in step["inputs"],
        sinks="sinks" in step["inputs"],
    )  # fmt: skip


def choose(vocab: int, dtype: str) -> lib.Launch:
    """The kernel that picks a token of each row of logits, the likeliest or a drawn one."""
    arguments = (("logits", dtype), ("how", "i32"), ("tokens", "i32"))
    unaligned = ("logits",) if vocab * (4 if dtype == "f32" else 2) % 16 else ()
    constants = {"vocab": vocab, "tile": 2048, "part": 1024}
    return lib.Launch("choose", "choose.choose", arguments, constants, 8, 2, unaligned)


def carry() -> lib.Launch:
    """The kernel that makes chosen tokens those of the next step."""
    arguments = (("chosen", "i32"), ("sources", "i32"), ("tokens", "i32"), ("count", "int"))
    return lib.Launch("carry", "choose.carry", arguments, {"tile": 128}, 4, 1)


REDUCED = (256, 1)  # numbers in a block of `all_reduce` and its warps, measured (decision 63)
REDUCED_BLOCKS = 4096  # of that size, for two ranks: about what an H100 holds at once
MOST_RANKS = 8


def all_reduce(
    dtype: str, width: int, ranks: int, blocks: int, tile: int = REDUCED[0], warps: int = REDUCED[1]
) -> lib.Launch:
    """The kernel that adds up values of ranks, of any number of rows of `width` numbers, `blocks` tiles at most."""
    word, vector = ("i32", 4) if dtype == "f32" else ("i16", 8)
    unit = vector if width % vector == 0 else 1  # numbers of which `count` says how many there are
    rooms = ((f"room_{rank}", word if rank < ranks else "") for rank in range(MOST_RANKS))
    arguments = (
        ("source", dtype), ("target", dtype), ("turns", "i32"), ("stop", "i32"), *rooms, ("own", word),
        ("count", "int"), ("rank", "int"),
    )  # fmt: skip
    constants = {"unit": unit, "ranks": ranks, "size": blocks * tile, "tile": tile}
    return lib.Launch("all_reduce", "all_reduce.all_reduce", arguments, constants, warps, 1)


def reductions(plan: Mapping[str, Any]) -> dict[str, lib.Launch]:
    """The kernels that add up values of a plan's ranks, by name; of more, which all send to all, fewer numbers."""
    widths: dict[tuple[str, int], int] = {}
    for step in plan["steps"]:
        if step["kind"] == "collective" and step["name"] == "all_reduce":
            value, ranks = plan["values"][step["inputs"]["x"]], step["attrs"]["ranks"]
            key = (value["dtype"], ranks)
            widths[key] = gcd(widths.get(key, 0), value["shape"][-1])
    return {
        f"{REDUCE}{dtype}": all_reduce(dtype, width, ranks, REDUCED_BLOCKS // (ranks - 1))
        for (dtype, ranks), width in widths.items()
        if ranks <= MOST_RANKS
    }


def other_launches(plan: Mapping[str, Any]) -> dict[str, lib.Launch]:
    """What a plan needs beside attention, by name."""
    found = reductions(plan)
    logits = next((port for port in plan["output_types"] if port["name"] == "logits"), None)
    if logits is not None and logits["dtype"] in FLOATS and isinstance(logits["shape"][-1], int):
        found["choose"] = choose(logits["shape"][-1], logits["dtype"])
        if plan["cache"] is not None and plan["cache"].get("kind") != "linear":
            found["carry"] = carry()
    for weight in plan["weights"].values():
        how = weight.get("random") or {}
        if "normal" in how:
            arguments = (("out", weight["dtype"]), ("count", "int"), ("seed", "int"))
            constants = {"mean": how["normal"], "tile": 1024}
            name = f"normal.{weight['dtype']}.{how['normal']}"
            found[name] = lib.Launch("normal", "random.normal", arguments, constants, 4, 2)
        elif "codes" in how:
            arguments = (("out", "i32"), ("count", "int"), ("seed", "int"))
            keep, add = how["codes"]
            constants = {"keep": _word(keep), "add": _word(add), "tile": 1024}
            found[f"codes.{keep}.{add}"] = lib.Launch("codes", "random.codes", arguments, constants, 4, 2)
    return found


def _word(byte: int) -> int:
    """A signed word of four times a byte."""
    return int.from_bytes(bytes([byte] * 4), "little", signed=True)


def sizes_of(plan: Mapping[str, Any]) -> list[int]:
    """The numbers of rows of programs that a plan can have.

    Below PROMPT rows only sequences that decode come, one row each; and no call has more rows than tokens.
    """
    most = {name: high for name, (_, _, high) in plan["dims"].items()}
    tokens = most.get("T") or most["B"] * most["S"]
    batch = most["B"] if "T" in most else tokens
    kept = [size for before, size in zip((0, *SIZES), SIZES, strict=False) if size >= PROMPT or before < batch]
    return [size for before, size in zip((0, *kept), kept, strict=False) if before < tokens]


def segment_programs(plan: Mapping[str, Any], out: Path, architecture: int) -> dict[str, dict[int, Program]]:
    """The kernels of programs, and of those engines that have only what compiler/kernels/rows.py knows."""
    found: dict[str, dict[int, Program]] = {}
    wanted = sizes_of(plan)
    programs = {step["file"] for step in plan["steps"] if step["kind"] == "program"}
    engines = {step["file"] for step in plan["steps"] if step["kind"] == "engine"}
    for file in sorted(programs | engines):
        graph = parse((out / file).read_text(encoding="utf-8"))
        try:
            if file in engines and any(equation.attr.get("block") for equation in graph.equations):
                raise RefusedError("an engine's scales of blocks lie otherwise than a kernel reads them")
            sizes = {size: program_of(graph, size, architecture) for size in wanted}
            launches = [call.launch for program in sizes.values() for call in program.calls]
            if file in engines and any(launch.name in IN_WORDS for launch in launches):
                raise RefusedError("an engine's codes lie otherwise than a kernel reads them")
            found[file] = sizes
        except RefusedError as reason:
            if file in programs:
                raise
            _LOG.info("%s runs as an engine at every size: %s", file, reason)
    return found


def reachable(plan: Mapping[str, Any], asked: lib.Attention, architecture: int) -> list[lib.Launch]:
    """The kernels of an attention, without splits of more parts than the longest sequence has tiles of keys."""
    _, _, places = plan["dims"]["P"]
    tiles = -(-places // plan["dims"]["B"][2] * asked.block // lib.LEAST_KEYS)
    every = lib.launches(asked, architecture)
    return [launch for launch in every if launch.constants.get("splits", 1) in range(1, max(tiles, 1) + 1)]


def write_kernels(
    plan: Mapping[str, Any], out: Path, architectures: Sequence[int], done: Callable[[int, int], None] | None = None
) -> None:
    """Compile what the kernel steps of a plan need for GPUs (90 is sm_90) into OUT/kernels; `done` as in `build`.

    Raises SpecRTError LOWER-020 where Triton is not installed.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    sets: list[lib.Attention] = []
    steps: dict[str, int] = {}
    for index, step in enumerate(plan["steps"]):
        if step["kind"] == "kernel":
            asked = attention_of(plan, step)
            if asked not in sets:
                sets.append(asked)
            steps[str(index)] = sets.index(asked)
    others = other_launches(plan)
    made: dict[str, dict[str, Any]] = {}
    programs: dict[str, Any] = {}
    attentions: dict[str, Any] = {}
    for architecture in architectures:
        wanted = [reachable(plan, asked, architecture) for asked in sets]
        attentions[f"sm{architecture}"] = [{launch.name: _key(launch) for launch in one} for one in wanted]
        own = segment_programs(plan, out, architecture)
        launches = [call.launch for sizes in own.values() for program in sizes.values() for call in program.calls]
        launches += [*(launch for one in wanted for launch in one), *others.values()]
        unique = {_key(launch): launch for launch in launches}
        programs[f"sm{architecture}"] = {
            file: {str(size): as_dict(program, _key) for size, program in sizes.items()} for file, sizes in own.items()
        }
        for key, compiled in zip(unique, build(list(unique.values()), architecture, done), strict=True):
            file = f"{key}.sm{architecture}.cubin"
            (folder / file).write_bytes(compiled.cubin)
            entry = made.setdefault(key, {"arguments": compiled.arguments, "constants": compiled.launch.constants})
            entry[f"sm{architecture}"] = compiled.as_dict(f"{FOLDER}/{file}")
    document = {
        "format": FORMAT,
        "architectures": list(architectures),
        "sets": attentions,
        "attention": steps,
        "kernels": made,
        "programs": programs,
        "others": {name: _key(launch) for name, launch in others.items()},
    }
    (folder / "kernels.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _key(launch: lib.Launch) -> str:
    text = json.dumps([launch.source, launch.arguments, sorted(launch.constants.items()), launch.warps, launch.stages,
                       launch.text, launch.resident])  # fmt: skip
    return f"{launch.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
