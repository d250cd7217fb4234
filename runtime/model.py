"""The model that a user holds: lists of token ids, or text, in; logits, ids or text out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runtime.bundle import Bundle, Limits
from runtime.checks import as_array, check_inputs
from runtime.encoder import Encoder
from runtime.engine import Engine
from runtime.executable import PACKED, Executable, Floats
from runtime.request import Request
from runtime.sampling import Sampling
from runtime.tokenizer import Tokenizer
from specs.errors import SpecRTError

GPU_STEP_TOKENS = 2048  # in one call on a GPU: its products reach their full rate there (docs/decisions.md)
NEW_TOKENS = 128  # where the caller does not say how many
Rows = Sequence[Sequence[int]]
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")


@dataclass(frozen=True)
class Event:
    """One new id of a row; `finish` with its last: the stop token came, or max_new_tokens did."""

    row: int
    token: int
    index: int
    finish: Literal["stop", "length"] | None


class Model:
    """A loaded bundle; `close` gives back memory and device, also at the end of a `with` block."""

    def __init__(self, bundle: Bundle, executable: Executable, *, step_tokens: int | None = None) -> None:
        """Over an executable of the bundle's plan; `load` makes both. Raises SpecRTError RUN-013."""
        self.bundle, self.executable = bundle, executable
        self.role, self.vocab, self.stop = bundle.role, bundle.vocab, bundle.stop
        self.limits: Limits = bundle.limits
        self._tokenizer: Tokenizer | None = None
        self._engine: Engine | None = None
        self._encoder: Encoder | None = None
        if bundle.role == "decoder":
            self._engine = Engine(
                executable, max_batch=self.limits.max_batch, max_sequence=self.limits.max_sequence, vocab=self.vocab,
                inputs=[port.name for port in bundle.program.inputs], derive=bundle.derive, step_tokens=step_tokens,
            )  # fmt: skip
        else:
            self._encoder = Encoder(executable, bundle)

    def close(self) -> None:
        """Give back what the model holds; it can't be run afterwards."""
        self.executable.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        """Where requests are submitted and stepped, for serving. Raises SpecRTError RUN-014 for an encoder."""
        if self._engine is None:
            hint = "`forward` gives its outputs"
            raise SpecRTError("RUN-014", f"`{self.bundle.name}` is an encoder: it generates no tokens", hint=hint)
        return self._engine

    # -- numbers --------------------------------------------------------------------------------------------------

    def forward(self, token_lists: Rows, **inputs: Sequence[Any]) -> list[dict[str, Floats]]:
        """All outputs of each row by name, [len, ...]; `inputs` are the model's further inputs, one value for each row;
        those that follow from the tokens by a rule of the bundle may be left out.

        Raises SpecRTError RUN-001 to RUN-009, RUN-017.
        """
        rows = _rows(token_lists)
        if self._encoder is not None:
            return self._encoder.run(rows, inputs)
        each = self._each(inputs, len(rows))
        requests: list[Request] = []
        try:
            for row, given in zip(rows, each, strict=True):
                requests.append(self.engine.submit_logits(row, inputs=given))
            while any(request.finish is None for request in requests):
                self.engine.step()
        finally:
            for request in requests:
                self.engine.cancel(request)
        return [{"logits": request.logits} for request in requests]

    def logits(self, token_lists: Rows, **inputs: Sequence[Any]) -> list[Floats]:
        """Logits f32[len, V] of each row. Raises SpecRTError RUN-001 to RUN-009, RUN-015 where the model has none."""
        if "logits" not in self.bundle.program.values:
            names = ", ".join(f"`{name}`" for name in self.bundle.program.values)
            raise SpecRTError(
                "RUN-015", f"`{self.bundle.name}` has no logits", hint=f"`forward` gives its outputs: {names}"
            )
        return [outputs["logits"] for outputs in self.forward(token_lists, **inputs)]

    # -- new tokens -----------------------------------------------------------------------------------------------

    def generate(
        self,
        token_lists: Rows,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | Sequence[int] | None = None,
        stop: int | Iterable[int] | None = None,
        **inputs: Sequence[Any],
    ) -> list[list[int]]:
        """New ids of each row: the likeliest each time, or drawn where temperature, top_k or top_p is given.

        A row ends after `max_new_tokens` (by default 128, or what the limit leaves) or with a stop token, which belongs
        to the new ids; `stop` None means the bundle's, () means none. A `seed` holds for each row by itself, or there
        is one for each.
        Raises SpecRTError RUN-001 to RUN-009, RUN-017, RUN-020 for sampling values, RUN-021 for stop, RUN-030 for NaN.
        """
        requests = self._submit(
            token_lists, max_new_tokens, stop, seed, inputs,
            temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty,
        )  # fmt: skip
        for _ in self._run(requests):
            pass
        return [request.new for request in requests]

    def stream(self, token_lists: Rows, **options: Any) -> Iterator[Event]:
        """`generate`, each id as it comes; what is left is cancelled where the iterator is closed early."""
        yield from self._run(self._submit_options(token_lists, options))  # submitted when first asked for an id

    def text(self, prompt: str, **options: Any) -> str:
        """The text that goes on from a prompt; options as of `generate`. Raises SpecRTError RUN-009."""
        return "".join(self.text_stream(prompt, **options))

    def text_stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """`text`, piece by piece as it comes."""
        tokenizer = self.tokenizer
        ids = tokenizer.encode(prompt)
        events = self.stream([ids], **options)
        return tokenizer.stream((event.token for event in events), after=ids)

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer. Raises SpecRTError RUN-009 where it has none, RUN-010 where it can't be read."""
        if self._tokenizer is None:
            if self.bundle.tokenizer is None:
                hint = "use `generate` with token ids, or compile from a checkpoint folder with a tokenizer.json"
                raise SpecRTError("RUN-009", f"the bundle `{self.bundle.name}` has no tokenizer", hint=hint)
            self._tokenizer = Tokenizer(self.bundle.tokenizer)
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text that `ids` add after other ids."""
        return self.tokenizer.decode(ids, after)

    # -- how ------------------------------------------------------------------------------------------------------

    def _submit_options(self, token_lists: Rows, options: dict[str, Any]) -> list[Request]:
        known = {name: options.pop(name) for name in _SAMPLING if name in options}
        return self._submit(
            token_lists, options.pop("max_new_tokens", None), options.pop("stop", None), options.pop("seed", None),
            options, **known,
        )  # fmt: skip

    def _submit(
        self,
        token_lists: Rows,
        max_new_tokens: int | None,
        stop: Any,
        seed: Any,
        inputs: dict[str, Any],
        **sampling: Any,
    ) -> list[Request]:
        engine = self.engine
        rows = _rows(token_lists)
        ends = self._stop(stop)
        each = self._each(inputs, len(rows))
        seeds: list[Any] = list(seed) if isinstance(seed, (list, tuple, np.ndarray)) else [seed] * len(rows)
        if len(seeds) != len(rows):
            raise SpecRTError(
                "RUN-020", f"`seed` has {len(seeds)} values for {len(rows)} prompts, expected one, or one for each"
            )
        requests: list[Request] = []
        try:
            for row, own, given in zip(rows, seeds, each, strict=True):
                how = Sampling(seed=own, **sampling)
                most = max_new_tokens
                if most is None:
                    most = max(1, min(NEW_TOKENS, engine.max_sequence - len(row)))
                requests.append(engine.submit(row, how, max_new_tokens=most, stop=ends, inputs=given))
        except SpecRTError:
            for request in requests:
                engine.cancel(request)
            raise
        return requests

    def _run(self, requests: list[Request]) -> Iterator[Event]:
        """Step until all requests have ended, whoever steps them; each id once."""
        open_rows = list(enumerate(requests))
        seen = [0] * len(requests)
        try:
            while open_rows:
                ended = False
                for row, request in open_rows:
                    while seen[row] < len(request.new):
                        index = seen[row]
                        seen[row] += 1
                        last = seen[row] == len(request.new)
                        finish = request.finish if last and request.finish in ("stop", "length") else None
                        yield Event(row, request.new[index], index, finish)
                    if request.error is not None:
                        raise request.error
                    ended = ended or request.finish is not None
                if ended:
                    open_rows = [(row, request) for row, request in open_rows if request.finish is None]
                if open_rows:
                    self.engine.step()
        finally:
            for request in requests:
                self.engine.cancel(request)

    def _stop(self, stop: Any) -> frozenset[int]:
        if stop is None:
            return frozenset(self.stop)
        try:
            ids = [int(token) for token in ([stop] if isinstance(stop, (int, np.integer)) else stop)]
        except (TypeError, ValueError) as error:
            raise SpecRTError("RUN-021", f"`stop` is {stop!r}, expected token ids; () for none") from error
        for token in ids:
            if not 0 <= token < self.vocab:
                raise SpecRTError("RUN-021", f"stop token {token} is out of range: ids go from 0 to {self.vocab - 1}")
        return frozenset(ids)

    def _each(self, inputs: dict[str, Any], count: int) -> list[dict[str, int]]:
        """Further inputs of a decoder, row by row."""
        check_inputs(inputs, self.engine.extra_inputs, self.engine.derive)
        names = [name for name in self.engine.extra_inputs if name in inputs]
        columns: dict[str, list[int]] = {}
        for name in names:
            values = as_array(inputs[name])
            if values.ndim != 1 or len(values) != count or values.dtype.kind not in "iu":
                message = (
                    f"input `{name}` is {inputs[name]!r}, expected whole numbers, one for each of {count} sequences"
                )
                raise SpecRTError("RUN-008", message)
            columns[name] = values.tolist()
        return [{name: columns[name][row] for name in names} for row in range(count)]


def _rows(token_lists: Rows) -> list[list[int]]:
    """Rows of plain ints. Raises SpecRTError RUN-003 for what are no lists of ids."""
    rows: list[list[int]] = []
    if isinstance(token_lists, str) or not isinstance(token_lists, Iterable):
        raise _no_rows(token_lists)
    for row in token_lists:
        array = as_array(row)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise _no_rows(row)
        rows.append(array.tolist())
    return rows


def _no_rows(found: object) -> SpecRTError:
    message = f"expected lists of token ids, one for each sequence; found {repr(found)[:80]}"
    return SpecRTError("RUN-003", message, hint="one prompt is [[1, 2, 3]]; for text there is `text`")


def load(
    path: str | Path,
    *,
    cache_tokens: int | None = None,
    threads: int | None = None,
    step_tokens: int | None = None,
    verify: bool = True,
) -> Model:
    """Load a bundle: check its files (hashes too, unless `verify` is off), compile its engines, allocate the KV cache.

    `cache_tokens` is the size of the cache, by default what the limits can use and at most half of the free memory
    (nearly all of a GPU's); `threads` the CPU threads, by default all cores; `step_tokens` the most tokens in one call.
    Raises SpecRTError BUNDLE-001 to BUNDLE-009, RUN-011 to RUN-013, RUN-016; for a GPU bundle also BUNDLE-020 to
    BUNDLE-024, RUN-040 to RUN-042.
    """
    bundle = Bundle.open(path, verify=verify)
    if any((step.kind, step.backend) in (("engine", "tensorrt"), ("program", "cuda")) for step in bundle.program.steps):
        return _on_gpu(bundle, cache_tokens, step_tokens)
    from runtime.openvino_executable import OpenVINOExecutable

    return Model(
        bundle, OpenVINOExecutable(bundle, cache_tokens=cache_tokens, threads=threads), step_tokens=step_tokens
    )


def _on_gpu(bundle: Bundle, cache_tokens: int | None, step_tokens: int | None) -> Model:
    # prompts with inputs of their own are never cut: a step may take its tokens and one such prompt (runtime/engine.py)
    own = {port.name for port in bundle.program.inputs} - set(PACKED)
    longest = bundle.limits.max_sequence if own else 0
    dims, cache = bundle.program.dims, bundle.program.cache
    linear = cache is not None and cache.kind == "linear"
    # over a linear cache each prompt is a call of its own, and so are the sequences that decode
    most = dims["S"][2] if linear else dims["T"][2] - longest if "T" in dims else None
    if step_tokens is not None and most is not None and step_tokens > most:
        message = f"`step_tokens` is {step_tokens}, the engines of `{bundle.name}` take {most}"
        raise SpecRTError("RUN-013", message)
    tokens = step_tokens or max(GPU_STEP_TOKENS, bundle.limits.max_batch)
    tokens = tokens if most is None else min(tokens, most)
    try:
        from runtime.cuda.executable import CUDAExecutable
        from runtime.cuda.native import NativeExecutable

        executable: Executable
        if linear:
            tokens = max(tokens, bundle.limits.max_batch)
            executable = NativeExecutable(bundle, tokens=max(tokens, longest), cache_tokens=cache_tokens)
        else:
            executable = CUDAExecutable(bundle, tokens=tokens + longest, cache_tokens=cache_tokens)
    except ImportError as error:
        hint = "`pip install specrt[tensorrt]` on a machine with an NVIDIA GPU, or compile with `--target cpu`"
        raise SpecRTError(
            "RUN-042", f"`{bundle.name}` is compiled for a GPU, and `{error.name}` is not installed", hint=hint
        ) from error
    return Model(bundle, executable, step_tokens=tokens if bundle.role == "decoder" else None)
