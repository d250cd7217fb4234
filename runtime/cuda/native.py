"""Runs a decoder that is one engine over a linear cache: a step of the scheduler is one call for all sequences that
decode, and one for each prompt (runtime/native.py); each is bound to the rows of its slots, where they lie. Decode
calls are CUDA graphs, one for each size of batch, made when the bundle is loaded: of the first slots, so that addresses
and shapes stay. A graph is the engine and the choice of tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from runtime.bundle import Bundle
from runtime.cuda import weights
from runtime.cuda.arena import value_bytes
from runtime.cuda.batch import Layout, buckets, fill, layout
from runtime.cuda.budget import Needs, plan_memory
from runtime.cuda.driver import Device
from runtime.cuda.engines import Engines
from runtime.cuda.kernels import Kernels
from runtime.cuda.on_device import OnDevice
from runtime.cuda.profiles import profile_of
from runtime.cuda.steps import WEIGHT, input_sizes
from runtime.executable import LIKELIEST, Array, Ints
from runtime.native import Call, Slots, merged
from runtime.program import BYTES
from runtime.sampling import HOW, how_of

_LOG = logging.getLogger("runtime")
CACHE = "cache:"


class NativeExecutable(OnDevice):
    """A bundle with `attention: native` on a GPU. `close` gives back everything."""

    def __init__(
        self, bundle: Bundle, *, tokens: int, cache_tokens: int | None = None, graphs: bool = True, device: int = 0
    ) -> None:
        """Load the engine and the weights, and allocate all memory; `tokens` is the longest piece of a prompt.

        Raises SpecRTError BUNDLE-020, BUNDLE-021, BUNDLE-022 to BUNDLE-024, RUN-011, RUN-012, RUN-040, RUN-041.
        """
        self._program = program = bundle.program
        (self._step,) = program.steps
        self._device = Device(device)
        try:
            self._engines = Engines(bundle.path, {self._step.file}, self._device)
            self._kernels = Kernels(bundle.path, self._device, True)
            self._load(bundle, tokens, cache_tokens, graphs)
        except BaseException:
            self.close()
            raise

    def _load(self, bundle: Bundle, tokens: int, cache_tokens: int | None, graphs: bool) -> None:
        program, device, limits = self._program, self._device, bundle.limits
        assert program.cache is not None  # a linear one is why this class runs it
        most = {"B": limits.max_batch, "S": min(tokens, program.dims["S"][2])}
        most["N"] = max(most.values())
        logits = program.values["logits"]
        logits_bytes = value_bytes(program, logits, most)
        sizes = input_sizes(program, {**most, "B": 1})
        block_bytes = 4 * max(layout(found).words for found in (sizes, input_sizes(program, {**most, "S": 1})))
        bound = {port: name.removeprefix(WEIGHT) for port, name in self._step.inputs.items() if name.startswith(WEIGHT)}
        stored = {name: program.weights[name] for name in dict.fromkeys(bound.values())}  # baked ones are in the engine
        offsets, weight_bytes = weights.place_weights(stored)
        engine = self._engines[self._step.file]
        token_bytes = 4 * most["N"]
        needs = Needs(weight_bytes, logits_bytes, engine.memory, block_bytes + (1 + HOW) * token_bytes)
        self.size = plan_memory(
            needs, program.cache, device.free_memory, max_batch=limits.max_batch,
            max_sequence=limits.max_sequence, cache_tokens=cache_tokens, tokens=tokens,
        )  # fmt: skip
        _LOG.info("GPU memory: %s", needs)
        base = device.allocate(weight_bytes)
        weights.upload_weights(bundle.path, stored, offsets, base, device)
        weights.random_weights(stored, offsets, base, self._kernels.others, device)
        self._logits, self._block = device.allocate(logits_bytes), device.allocate(block_bytes)
        self._staging: Ints = device.pinned(block_bytes).view(np.int32)
        self._host = device.pinned(logits_bytes)
        self._tokens = device.allocate(token_bytes)
        self._picked: Ints = device.pinned(token_bytes).view(np.int32)
        self._how = device.allocate(HOW * token_bytes)
        device.fill(self._how, 0, 4, HOW * most["N"])  # graphs choose where nobody asks too
        self._wanted: Ints = device.pinned(HOW * token_bytes).view(np.int32)
        self._scratch = device.allocate(engine.memory)
        captured = buckets(self.blocks) if graphs else []
        self._slots = Slots(program.inputs, self.blocks, self.block_size, captured)
        self._fixed = {port: base + offsets[name] for port, name in bound.items()}
        self._fixed |= {port: self._logits for port, name in self._step.outputs.items() if name == logits}
        self._caches = self._allocate_caches()
        self._places = {
            name.removeprefix(CACHE): self._caches[port][0]
            for port, name in self._step.inputs.items()
            if name.startswith(CACHE)
        }
        device.wait()
        self._graphs: dict[int, Any] = {}
        for size in captured:
            self._graphs[size] = self._capture(self._slots.idle(size))

    def _allocate_caches(self) -> dict[str, tuple[int, int, tuple[int, ...]]]:
        """Address, bytes of a row and shape of a row, of each port that is a cache: zeros, in one piece each."""
        cache, found = self._program.cache, {}
        assert cache is not None
        for layer in cache.layers:
            for name, width in ((layer.k, layer.dim), (layer.v, layer.value_dim)):
                row = (layer.heads, cache.block_size, width)
                size = cache.bytes_of(layer, width)
                address = self._device.allocate(self.blocks * size)
                # zeros: no NaN where nothing is seen, and what the last place must hold
                self._device.fill(address, 0, 4, self.blocks * size // 4)
                found[f"{CACHE}{name}"] = (address, size, row)
        ports = (*self._step.inputs.items(), *self._step.outputs.items())
        return {port: found[name] for port, name in ports if name.startswith(CACHE)}

    # -- what the scheduler uses ----------------------------------------------------------------------------------

    def execute(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Run the calls of a step and copy the wanted rows to the host; see runtime.executable.Executable."""
        calls = self._slots.calls(batch)
        return {"logits": merged(calls, [self._logits_of(call) for call in calls], len(batch["select"]))}

    def pick(self, batch: Mapping[str, Array], how: Ints = LIKELIEST) -> Ints:
        """Run, and choose a token of each selected row on the device; see runtime.executable.Picks."""
        rows = how_of(how, len(batch["select"])).reshape(-1, HOW)
        calls = self._slots.calls(batch)
        return merged(calls, [self._tokens_of(call, rows[call.to]) for call in calls], len(batch["select"]))

    # -- how ------------------------------------------------------------------------------------------------------

    # The calls of a step share the memory of the batch and of what is computed: each is read before the next begins.

    def _logits_of(self, call: Call) -> Array:
        (port,) = self._program.outputs
        vocab = int(port.shape[-1])
        self._run(call, choose=False)
        # of the earlier pieces of a prompt nothing is read
        host = self._host[: len(call.to) * vocab * BYTES[port.dtype]]
        if len(call.to):
            self._device.download(host, self._logits)
        self._device.wait()
        return host.view(np.float32).reshape(-1, vocab).copy()

    def _tokens_of(self, call: Call, how: Ints) -> Ints:
        words = HOW * max(call.sequences, len(call.to))  # a graph chooses for all its sequences
        self._wanted[:words] = 0
        self._wanted[: how.size] = how.reshape(-1)
        self._device.use()
        self._device.upload(self._how, self._wanted, 4 * words)
        self._run(call, choose=True)
        host = self._picked[: len(call.to)]
        if len(call.to):
            self._device.download(host, self._tokens)
        self._device.wait()
        return host.copy()

    def _run(self, call: Call, *, choose: bool) -> None:
        """Put a call into the stream: its arrays, then its graph, or the engine and the choice of wanted rows."""
        self._device.use()
        made = self._upload(call)
        graph = self._graphs.get(call.sequences) if call.tokens == 1 else None
        if graph is not None:
            self._device.replay(graph)
            return
        self._enqueue(call, made, None)
        if choose and len(call.to):
            self._choose(len(call.to))

    def _capture(self, call: Call) -> Any:
        """A decode call of this size as a graph; everything is run once before, as TensorRT wants it."""
        made = self._upload(call)

        def work() -> None:
            self._enqueue(call, made, call.sequences)
            self._choose(call.sequences)

        work()
        self._device.wait()
        return self._device.capture(work)

    def _upload(self, call: Call) -> Layout:
        """Copy a call's arrays to the device; calls of one size have one layout."""
        made = layout({name: array.size for name, array in sorted(call.arrays.items())})
        fill(self._staging, made, call.arrays, {})
        self._device.upload(self._block, self._staging, 4 * made.words)
        return made

    def _choose(self, rows: int) -> None:
        values = {"logits": self._logits, "how": self._how, "tokens": self._tokens}
        self._kernels.others["choose"].launch((rows, 1, 1), values)

    def _enqueue(self, call: Call, made: Layout, use: object) -> None:
        """Put the engine into the stream; `use` is of a graph, whose shapes stay."""
        addresses = self._fixed | {
            port: self._block + 4 * made.starts[name] for port, name in self._step.inputs.items() if name in made.starts
        }
        addresses |= {port: start + call.first * size for port, (start, size, _) in self._caches.items()}
        shapes = {port: call.arrays[name].shape for port, name in self._step.inputs.items() if name in call.arrays}
        shapes |= {port: (call.sequences, *row) for port, (_, _, row) in self._caches.items()}
        dims = {"B": call.sequences, "S": call.tokens, "N": len(call.arrays["select"])}
        profile = profile_of(self._program, dims)
        self._engines[self._step.file].enqueue(profile, use, self._scratch, addresses, shapes)
