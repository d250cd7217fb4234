"""Puts the steps of a plan into the stream: engines with their addresses, programs and attention with their kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.cuda.batch import LEAST_KEYS, programs_for, splits_for
from runtime.cuda.kernels import Kernel
from runtime.cuda.programs import RowProgram, most_rows, size_for
from runtime.program import Program, Step

if TYPE_CHECKING:
    from runtime.cuda.engines import Engine

WEIGHT = "weight:"


@dataclass(frozen=True)
class Call:
    """One batch on its way: sizes of the named dims, addresses of values, and how attention is divided.

    `use` names the captured graph that the call belongs to, None for a call outside of one.
    """

    dims: Mapping[str, int]
    addresses: Mapping[str, int]
    profile: int
    use: object
    singles: int  # sequences that decode; they come first
    tiles: int  # query tiles of the others
    context: int  # no sequence is longer

    @property
    def rows(self) -> int:
        """Of values between steps: tokens, padding of rows included."""
        return self.dims["T"] if "T" in self.dims else self.dims["B"] * self.dims["S"]


Enqueue = Callable[[Call], None]


@dataclass(frozen=True)
class Memory:
    """Addresses that stay: weights by name, caches by name, and room that steps use one after the other."""

    weights: Mapping[str, int]
    caches: Mapping[str, int]
    constants: Mapping[str, int]
    scratch: int
    parts: int
    tops: int
    ended: int


def engine_step(program: Program, step: Step, engine: Engine, memory: Memory) -> Enqueue:
    """An engine whose weight ports are bound to their places."""
    bound = {**step.inputs, **step.outputs}
    fixed = {
        port: memory.weights[value.removeprefix(WEIGHT)] for port, value in bound.items() if value.startswith(WEIGHT)
    }
    passed = {port: value for port, value in bound.items() if port not in fixed}
    shapes = {port: program.types[passed[port]].shape for port in engine.dynamic}

    def enqueue(call: Call) -> None:
        addresses = fixed | {port: call.addresses[value] for port, value in passed.items()}
        sizes = {
            port: tuple(dim if isinstance(dim, int) else call.dims[dim] for dim in shape)
            for port, shape in shapes.items()
        }
        engine.enqueue(call.profile, call.use, memory.scratch, addresses, sizes)

    return enqueue


def row_steps(
    step: Step, programs: Mapping[int, RowProgram], memory: Memory, most: Mapping[str, int]
) -> dict[int, Enqueue]:
    """A segment by its kernels, for at most so many rows each; their own memory is the engines' scratch."""
    ports = {**step.inputs, **step.outputs}
    weights = {
        port: memory.weights[value.removeprefix(WEIGHT)] for port, value in ports.items() if value.startswith(WEIGHT)
    }

    def enqueue_of(program: RowProgram, rows: int) -> Enqueue:
        temps = {name: memory.scratch + offset for name, offset in program.memory(rows)[0].items()}
        fixed = weights | temps

        def enqueue(call: Call) -> None:
            for one in program.calls:
                count = one.count(call.dims)
                values = {**call.dims, "count": count}  # a kernel may ask for the size of a dim
                for argument, place in one.places.items():
                    values[argument] = fixed[place] if place in fixed else call.addresses[ports[place]]
                tiles = -(-count // one.tile)
                # a row's kernel has its rows along the first axis, which may be the longest
                single = one.blocks == one.tile == 1
                one.kernel.launch((tiles, 1, one.depth) if single else (one.blocks, tiles, one.depth), values)

        return enqueue

    return {size: enqueue_of(program, most_rows(programs, size, most)) for size, program in programs.items()}


def program_step(sizes: Mapping[int, Enqueue]) -> Enqueue:
    """A segment that has no engine: the kernels for as many rows as a call has."""
    return lambda call: sizes[size_for(sizes, call.rows)](call)


def attention_step(
    program: Program, index: int, kernels: Mapping[str, Kernel], memory: Memory, multiprocessors: int
) -> Enqueue:
    """Attention of the sequences that decode and of the others, behind the append of what `decode` does not append."""
    step = program.steps[index]
    attrs = step.attrs
    append, prefill = kernels["append"], kernels["prefill"]
    heads, groups = int(attrs["heads"]), int(attrs["kv_heads"])
    tile = int(append.constants["tile"])
    append_tiles = (-(-heads // tile) if append.constants["pairs"] else 0) + -(-groups // tile)
    size = {"f32": 4, "f16": 2, "bf16": 2}[program.types[step.inputs["q"]].dtype]
    starts = {name: int(attrs[name]["offset"]) * size for name in ("q", "k", "v")}
    stay: dict[str, int] = {
        "k_cache": memory.caches[attrs["k_cache"]], "v_cache": memory.caches[attrs["v_cache"]],
        "parts": memory.parts, "tops": memory.tops, "ended": memory.ended,
    }  # fmt: skip
    if attrs["slopes"] is not None:
        stay["slopes"] = memory.constants[f"slopes.{index}"]
    passed: dict[str, str] = {}
    for port, value in (*step.inputs.items(), *step.outputs.items()):
        if value.startswith(WEIGHT):
            stay[port] = memory.weights[value.removeprefix(WEIGHT)]
        elif port != "max_context":  # kernels need no bound: they read each sequence's own
            passed[port] = value

    def enqueue(call: Call) -> None:
        values = stay | {port: call.addresses[value] + starts.get(port, 0) for port, value in passed.items()}
        for name in ("slots", "tile_rows", "tile_starts"):
            values[name] = call.addresses[name]
        splits, first = 1, 0  # tokens from `first` on are appended in a launch of their own
        if call.singles:
            splits = splits_for(call.singles, groups, -(-call.context // LEAST_KEYS), multiprocessors)
            first = call.singles if kernels[f"decode{splits}"].constants["new"] else 0
        if call.dims["T"] > first:
            append.launch((call.dims["T"] - first, append_tiles, 1), values | {"first": first})
        if call.singles:
            kernels[f"decode{splits}"].launch((call.singles, groups, splits), values)
        if call.tiles:
            prefill.launch(grid_of(prefill, call, multiprocessors), values | {"tiles": call.tiles})

    return enqueue


def grid_of(prefill: Kernel, call: Call, multiprocessors: int) -> tuple[int, int, int]:
    """Programs of prefill attention: one for each head and query tile, or as many as share them."""
    heads = int(prefill.constants["heads"])
    if "tiles" not in prefill.arguments:
        return heads, call.tiles, 1
    sizes = prefill.constants
    context = min(call.context, call.tiles * int(sizes["rows"]))  # a captured call's is the longest there may be
    head_bytes = 4 * int(sizes["groups"]) * int(sizes["dim"])  # a key and a value of 16-bit numbers
    sequences = max(1, call.dims["B"] - call.singles)
    return programs_for(heads, call.tiles, sequences, context, head_bytes, multiprocessors), 1, 1


def query_rows(kernels: Mapping[int, Mapping[str, Kernel]]) -> int:
    """Tokens in a query tile, the same for all attentions: they share one list of tiles."""
    rows = {int(one["prefill"].constants["rows"]) for one in kernels.values()}
    if len(rows) > 1:
        raise AssertionError(f"attentions with query tiles of {sorted(rows)} in one plan")
    return rows.pop() if rows else 1


def part_sizes(program: Program, sequences: int, multiprocessors: int) -> tuple[int, int, int]:
    """Bytes of the split results of decode attention that any step needs: values, maxima, how many splits ended."""
    parts = tops = ended = 0
    for step in program.steps:
        if step.kind == "kernel":
            heads, groups = int(step.attrs["heads"]), int(step.attrs["kv_heads"])
            for count in range(1, sequences + 1):
                splits = splits_for(count, groups, 1 << 30, multiprocessors)
                if splits > 1:
                    parts = max(parts, 4 * count * heads * splits * int(step.attrs["d_value"]))
                    tops = max(tops, 8 * count * heads * splits)
                    ended = max(ended, 4 * count * groups)
    return parts, tops, ended


def input_sizes(program: Program, dims: Mapping[str, int]) -> dict[str, int]:
    """Elements of each input of the model."""
    sizes: dict[str, int] = {}
    for port in program.inputs:
        count: Any = 1
        for dim in port.shape:
            count *= dim if isinstance(dim, int) else dims[dim]
        sizes[port.name] = count
    return sizes
