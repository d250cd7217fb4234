"""Runs a GPU plan: one arena, weights and cache on the device, decode steps as one CUDA graph for each batch size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.bundle import Bundle
from runtime.cuda import arena, programs, steps, weights
from runtime.cuda.batch import (
    WORD,
    Layout,
    Shape,
    buckets,
    fill,
    layout,
    leading_singles,
    query_tiles,
    shape_of,
    slots,
)  # fmt: skip
from runtime.cuda.budget import Needs, plan_memory
from runtime.cuda.collectives import Agreement, collective_step, gather_bytes
from runtime.cuda.communicator import Communicator
from runtime.cuda.driver import Device
from runtime.cuda.graphs import Graphs, Ways
from runtime.cuda.kernels import Kernels
from runtime.cuda.on_device import OnDevice
from runtime.cuda.profiles import dims_of, most, profile_of
from runtime.cuda.turns import Turn, Turns
from runtime.executable import LIKELIEST, Array, Ints
from runtime.program import BYTES
from runtime.sampling import HOW, how_of
from specs.errors import SpecRTError, Where

if TYPE_CHECKING:
    from runtime.cuda.engines import Engines

_LOG = logging.getLogger("runtime")
_PADDING = {"past_lens": -1, "slots": -1, "tile_rows": -1}
STEPS = {("engine", "tensorrt"), ("program", "cuda"), ("kernel", "cuda"), ("collective", "nccl")}
NUMPY = {"f32": np.float32, "i32": np.int32, "f16": np.float16}


class CUDAExecutable(OnDevice):
    """A bundle on a GPU. `close` gives back everything; used as a context manager it does so at the end."""

    stages = 1  # see runtime.executable.Ahead

    def __init__(
        self,
        bundle: Bundle,
        *,
        tokens: int,
        cache_tokens: int | None = None,
        graphs: bool = True,
        device: int = 0,
        connect: Callable[[Device, Kernels], Communicator] | None = None,
        agree: Callable[[int], int] = lambda blocks: blocks,
    ) -> None:
        """Load engines, kernels and weights, and allocate all memory; `tokens` is the most in one call.

        As one of several ranks, whose bundle is of this rank, `connect` waits for the others and joins them.
        Where stages share a model `agree` says how many blocks of the cache all of them have room for.
        Raises SpecRTError BUNDLE-009, BUNDLE-020 to BUNDLE-024, RUN-011, RUN-012, RUN-040, RUN-041; as `connect`.
        """
        self._program = program = bundle.program
        self._group: Communicator | None = None
        for index, step in enumerate(program.steps):
            if (step.kind, step.backend) not in STEPS:
                known = ", ".join(f"`{backend}`" for backend in sorted({backend for _, backend in STEPS}))
                message = f"step {index} is `{step.kind}` of `{step.backend}`, the GPU runs those of {known}"
                raise SpecRTError("BUNDLE-009", message, where=Where(str(bundle.path / "plan.json")))
        self._device = device_ = Device(device)
        try:
            self._engines = _engines(bundle, device_)
            random = any(weight.file is None for weight in program.weights.values())
            needed = random or any(step.backend == "cuda" for step in program.steps)
            self._kernels = Kernels(bundle.path, device_, needed)
            if connect is not None:  # before memory is counted: communicators take some
                self._group = connect(device_, self._kernels)
            self._agreement = None if self._group is None else Agreement(self._group, device_)
            self._load(bundle, tokens, cache_tokens, agree)
        except BaseException:
            if self._group is not None:
                self._group.abort()  # the others may never come to what this rank waits for
            self.close()
            raise
        self._sizes = buckets(min(bundle.limits.max_batch, self._most["B"])) if graphs and self.size else []
        self._longest = bundle.limits.max_sequence
        total = None if self._agreement is None else self._agreement.total
        self.graphs = Graphs(device_, program, self._ways, total)
        for size in self._sizes:  # now, not when a batch first has this size: it would wait for it
            self._capture(Shape(size, size, size, size, 0), self._turns.take())

    def _load(self, bundle: Bundle, tokens: int, cache_tokens: int | None, agree: Callable[[int], int]) -> None:
        program, device = self._program, self._device
        self._most = most(program, bundle.limits.max_batch, bundle.limits.max_sequence, tokens)
        places, arena_bytes = arena.place(arena.intervals(program, self._most))
        offsets, weight_bytes = weights.place_weights(program.weights)
        split_bytes = steps.part_sizes(program, self._most.get("B", 0), device.multiprocessors)
        parts, tops, ended = (arena.aligned(size) for size in split_bytes)
        self._rows = steps.query_rows(self._kernels.attention)
        block_bytes = 4 * layout(self._sizes_of(self._most)).words
        token_bytes = 4 * self._most.get("N", 1)
        handed = arena.SETS * arena.handed(program, self._most)[1]
        temps = [programs.scratch_bytes(sizes, self._most) for sizes in self._kernels.programs.values()]
        gathered = gather_bytes(program, bundle.tensor, self._most)
        scratch = max([0 if self._engines is None else self._engines.memory, gathered, *temps])
        needs = Needs(weight_bytes, arena_bytes + parts + tops + ended, scratch, block_bytes + token_bytes + handed)
        self.size = plan_memory(
            needs, program.cache, device.free_memory, max_batch=bundle.limits.max_batch,
            max_sequence=bundle.limits.max_sequence, cache_tokens=cache_tokens, tokens=tokens,
        )  # fmt: skip
        if self.size is not None:  # a block is one on all GPUs
            least = self.size.blocks if self._agreement is None else self._agreement.least(self.size.blocks)
            self.size = replace(self.size, blocks=agree(least))
        _LOG.info("GPU memory: %s", needs)
        base = device.allocate(weight_bytes)
        weights.upload_weights(bundle.path, program.weights, offsets, base, device)
        weights.random_weights(program.weights, offsets, base, self._kernels.others, device)
        room = device.allocate(arena_bytes + parts + tops + ended)
        self._values = {name: room + offset for name, offset in places.items()}
        self._block = device.allocate(block_bytes)
        self._tokens = self._chosen = device.allocate(token_bytes)  # and those that the next step may begin with
        self._turns = Turns(device, block_bytes, token_bytes, self.stages + 1)
        self._downloads: dict[str, Array] = {}
        self._places = self._caches()
        memory = steps.Memory(
            weights={name: base + offset for name, offset in offsets.items()}, caches=self._places,
            constants=self._constants(), scratch=device.allocate(scratch),
            parts=room + arena_bytes, tops=room + arena_bytes + parts, ended=room + arena_bytes + parts + tops,
        )  # fmt: skip
        if ended:
            device.fill(memory.ended, 0, WORD, ended // WORD)  # each launch leaves zeros
        for name in program.received:  # graphs are captured before any came
            device.fill(self._values[name], 0, 1, arena.value_bytes(program, name, self._most))
        self._ways = self._ways_of(memory)
        device.wait()

    def _ways_of(self, memory: steps.Memory) -> Ways:
        """How each step of the plan is put into the stream."""
        plain: list[steps.Enqueue] = []
        rows: list[Mapping[int, steps.Enqueue]] = []
        for index, step in enumerate(self._program.steps):
            kernels = self._kernels.programs.get(step.file, {})
            by_rows = steps.row_steps(step, kernels, memory, self._most)
            if step.kind == "kernel":
                attention = self._kernels.attention[self._program.first + index]
                plain.append(
                    steps.attention_step(self._program, index, attention, memory, self._device.multiprocessors)
                )
            elif step.kind == "program":
                plain.append(steps.program_step(by_rows))
            elif step.kind == "collective":
                assert self._group is not None  # there are other ranks
                plain.append(collective_step(self._program, step, self._group, self._device, memory.scratch))
            else:
                assert self._engines is not None  # there is a step for each
                plain.append(steps.engine_step(self._program, step, self._engines[step.file], memory))
            rows.append(by_rows if step.kind == "engine" else {})
        return Ways(plain, rows)

    @property
    def choices(self) -> dict[str, dict[str, Any]]:
        """What was measured, and chosen."""
        return self.graphs.choices

    # -- what the scheduler uses ----------------------------------------------------------------------------------

    def execute(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Run the steps in order and copy the outputs to the host; see runtime.executable.Executable."""
        return self.outputs(self._run(batch, self._turns.take()))

    def outputs(self, dims: Mapping[str, int]) -> dict[str, Array]:
        """The model's outputs of the step that was put into the stream last, on the host."""
        found: dict[str, Array] = {}
        for port in self._program.outputs:
            shape = [dim if isinstance(dim, int) else dims[dim] for dim in port.shape]
            size = int(np.prod(shape)) * BYTES[port.dtype]
            host = self._download_to(port.name, size)
            self._device.download(host, self._values[self._program.values[port.name]])
            found[port.name] = host.view(NUMPY[port.dtype]).reshape(shape)
        self._device.wait()
        return found

    def pick(self, batch: Mapping[str, Array], how: Ints = LIKELIEST) -> Ints:
        """Run, and choose a token of each selected row on the device; see runtime.executable.Picks."""
        return self.wait(self.launch(batch, how=how))

    def launch(
        self, batch: Mapping[str, Array], sources: Sequence[int] = (), how: Ints = LIKELIEST, behind: int = 1
    ) -> int:
        """Put a step into the stream and give its ticket; see runtime.executable.Ahead."""
        assert behind == 1  # there are no tokens of an earlier step
        turn = self._turns.take()
        dims = self._run(batch, turn, sources, how)
        return self._turns.started(turn, self._tokens, dims["N"])

    def wait(self, ticket: int) -> Ints:
        """The tokens that a step chose, once it is done; see runtime.executable.Ahead."""
        self._device.use()
        return self._turns.wait(ticket)

    def close(self) -> None:
        """Give back engines, graphs and memory, once what is on its way is done."""
        turns = getattr(self, "_turns", None)  # None where loading failed
        if turns is not None and self._device is not None:
            self._device.use()
            turns.close()
        super().close()

    # -- how ------------------------------------------------------------------------------------------------------

    def _run(
        self, batch: Mapping[str, Array], turn: Turn, sources: Sequence[int] = (), how: Ints = LIKELIEST
    ) -> dict[str, int]:
        """Put a batch into the stream: as a graph where all sequences decode, else step by step."""
        self._device.use()
        dims = dims_of(self._program, batch)
        arrays = {port.name: batch[port.name] for port in self._program.inputs}
        if self.size is None:
            self._direct(arrays, dims, 0, 0, turn)
            return dims
        singles = leading_singles(batch["seq_begins"])
        arrays["slots"] = slots(batch, self.block_size)
        arrays["sources"] = np.array(sources, np.int32)
        arrays["how"] = how_of(how, dims["N"])
        arrays["tile_rows"], arrays["tile_starts"] = query_tiles(batch, singles, self._rows)
        shape = shape_of(dims, singles, self._sizes, self._rows, self._most["T"])
        found = None if shape is None else self.graphs[shape]
        if shape is not None and found is None and self.graphs.again(shape):
            found = self._capture(shape, turn)
        if found is None:
            self._direct(arrays, dims, singles, len(arrays["tile_rows"]), turn, len(sources))
        else:
            graph, made = found
            fill(turn.staging, made, arrays, _PADDING)
            self._upload(made, turn, len(sources))
            self._arrive(dims)
            self._device.replay(graph)
        return dims

    def _arrive(self, dims: Mapping[str, int]) -> None:
        """Put in front of the steps what brings values from another GPU; here there is none."""

    def _direct(
        self,
        arrays: Mapping[str, Array],
        dims: Mapping[str, int],
        singles: int,
        tiles: int,
        turn: Turn,
        carried: int = 0,
    ) -> None:
        """Put every step into the stream."""
        made = layout({name: array.size for name, array in arrays.items()})
        fill(turn.staging, made, arrays, {})
        context = int(arrays["max_context"]) if "max_context" in arrays else 0
        call = self._call(made, dims, None, singles, tiles, context)
        self._upload(made, turn, carried)
        self._arrive(dims)
        self.graphs.direct(call)
        self._choose(call)

    def _call(
        self, made: Layout, dims: Mapping[str, int], use: object, singles: int, tiles: int, context: int
    ) -> steps.Call:
        addresses = self._values | {name: self._block + 4 * start for name, start in made.starts.items()}
        profile = profile_of(self._program, dims)
        return steps.Call(dims, addresses, profile, use, singles, tiles, context)

    def _upload(self, made: Layout, turn: Turn, carried: int = 0) -> None:
        """Copy the arrays of a step to the device, then its first tokens from those that the step before chose."""
        self._device.upload(self._block, turn.staging[: made.words])
        if carried:
            carry = self._kernels.others["carry"]
            values = {name: self._block + WORD * made.starts[name] for name in ("tokens", "sources")}
            grid = (-(-carried // carry.constants["tile"]), 1, 1)
            carry.launch(grid, values | {"chosen": self._chosen, "count": carried})

    def _choose(self, call: steps.Call) -> None:
        if "choose" in self._kernels.others and "how" in call.addresses and "logits" in self._program.values:
            values = {"logits": call.addresses[self._program.values["logits"]], "how": call.addresses["how"]}
            self._kernels.others["choose"].launch((call.dims["N"], 1, 1), values | {"tokens": self._tokens})

    def _capture(self, shape: Shape, turn: Turn) -> tuple[Any, Layout]:
        """A step of this shape as a graph, made with a batch in which nobody takes part."""
        dims = self._most | {"T": shape.tokens, "B": shape.sequences, "N": shape.rows, "B1": shape.sequences + 1}
        dims["P"] = min(self._most["P"], shape.sequences * -(-self._longest // self.block_size))
        made = layout(self._sizes_of(dims) | {"tile_rows": shape.tiles, "tile_starts": shape.tiles})
        nobody = {name: np.full(size, _PADDING.get(name, 0), np.int32) for name, size in made.sizes.items()}
        fill(turn.staging, made, nobody, {})
        self._upload(made, turn)
        call = self._call(made, dims, shape, shape.singles, shape.tiles, self._longest)
        return self.graphs.capture(shape, made, call, self._choose)

    def _sizes_of(self, dims: Mapping[str, int]) -> dict[str, int]:
        """Elements of every array in the block of a batch."""
        sizes = steps.input_sizes(self._program, dims)
        if self._program.cache is not None:
            tiles = -(-dims["T"] // self._rows) + dims["B"]  # each sequence may leave its last tile unfilled
            sizes |= {"slots": dims["T"], "sources": dims["B"], "tile_rows": tiles, "tile_starts": tiles}
            sizes["how"] = HOW * dims["N"]
        return sizes

    def _caches(self) -> dict[str, int]:
        found: dict[str, int] = {}
        cache = self._program.cache
        if cache is not None:
            for layer in cache.layers:
                for name, width in ((layer.k, layer.dim), (layer.v, layer.value_dim)):
                    found[name] = self._device.allocate(self.blocks * cache.bytes_of(layer, width))
        return found

    def _constants(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for index, step in enumerate(self._program.steps):
            if step.kind == "kernel" and step.attrs["slopes"] is not None:
                values = np.array(step.attrs["slopes"], np.float32)
                found[f"slopes.{index}"] = self._device.allocate(values.nbytes)
                self._device.upload(found[f"slopes.{index}"], values)
                self._device.wait()
        return found

    def _download_to(self, name: str, size: int) -> Array:
        """Pinned memory for an output; it grows, and stays for the next call."""
        held = self._downloads.get(name)
        if held is None or held.nbytes < size:
            held = self._downloads[name] = self._device.pinned(size)
        return held[:size]


def _engines(bundle: Bundle, device: Device) -> Engines | None:
    """The engines of a plan; without any TensorRT is not asked for. Raises SpecRTError BUNDLE-020 and BUNDLE-021."""
    files = {step.file for step in bundle.program.steps if step.kind == "engine"}
    if not files:
        return None
    from runtime.cuda.engines import Engines

    return Engines(bundle.path, files, device)
