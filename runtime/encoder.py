"""Runs padded batches [B, S] of a model without a cache: every token of a row sees the whole row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from runtime.bundle import Bundle
from runtime.checks import as_array, check_inputs, check_prompt
from runtime.executable import PADDED, Array, Executable, Floats
from runtime.program import Port
from specs.errors import SpecRTError

_PADDING = -1  # the position of a token that is not there
_DTYPES = {"i32": np.int32, "f32": np.float32}


class Encoder:
    """Batches rows of similar length, so that little is computed for padding."""

    def __init__(self, executable: Executable, bundle: Bundle) -> None:
        self._executable, self._program, self._limits = executable, bundle.program, bundle.limits
        self._vocab, self._derive, self._bounds = bundle.vocab, bundle.derive, bundle.bounds
        self._extra = tuple(port for port in bundle.program.inputs if port.name not in PADDED)

    def run(self, rows: Sequence[Sequence[int]], inputs: Mapping[str, Sequence[Any]]) -> list[dict[str, Floats]]:
        """The outputs of each row, without padding. Raises SpecRTError RUN-001 to RUN-004, RUN-008, RUN-017."""
        for tokens in rows:
            check_prompt(tokens, self._limits.max_sequence, self._vocab)
        check_inputs(inputs, [port.name for port in self._extra], self._derive)
        inputs = {**self._derived(rows, inputs), **inputs}
        for port in self._extra:
            self._check(port, inputs[port.name], rows)
        results: list[dict[str, Floats]] = [{} for _ in rows]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        for start in range(0, len(order), self._limits.max_batch):
            chosen = order[start : start + self._limits.max_batch]
            outputs = self._executable.execute(self._batch(chosen, rows, inputs))
            for place, row in enumerate(chosen):
                results[row] = {
                    port.name: self._cut(port, outputs[port.name][place], len(rows[row]))
                    for port in self._program.outputs
                }
        return results

    def _derived(self, rows: Sequence[Sequence[int]], inputs: Mapping[str, Any]) -> dict[str, list[Any]]:
        missing = [port.name for port in self._extra if port.name not in inputs]
        return {name: [self._derive[name].apply(name, tokens) for tokens in rows] for name in missing}

    def _batch(
        self, chosen: Sequence[int], rows: Sequence[Sequence[int]], inputs: Mapping[str, Any]
    ) -> dict[str, Array]:
        shape = (len(chosen), max(len(rows[row]) for row in chosen))
        batch: dict[str, Array] = {
            "tokens": np.zeros(shape, np.int32),
            "positions": np.full(shape, _PADDING, np.int32),
            "lengths": np.zeros(shape, np.int32),
            "rows": np.repeat(np.arange(shape[0], dtype=np.int32)[:, None], shape[1], axis=1),
        }
        for place, row in enumerate(chosen):
            size = len(rows[row])
            batch["tokens"][place, :size] = rows[row]
            batch["positions"][place, :size] = np.arange(size)
            batch["lengths"][place] = size
        for port in self._extra:
            value = np.zeros(shape if len(port.shape) > 1 else shape[:1], _DTYPES[port.dtype])
            for place, row in enumerate(chosen):
                if value.ndim > 1:
                    value[place, : len(rows[row])] = inputs[port.name][row]
                else:
                    value[place] = inputs[port.name][row]
            batch[port.name] = value
        return batch

    def _check(self, port: Port, given: Sequence[Any], rows: Sequence[Sequence[int]]) -> None:
        if not hasattr(given, "__len__") or len(given) != len(rows):
            message = f"input `{port.name}` is {repr(given)[:80]}, expected one value for each of {len(rows)} sequences"
            raise SpecRTError("RUN-008", message)
        shape = () if len(port.shape) == 1 else (-1,)
        for place, (value, row) in enumerate(zip(given, rows, strict=True)):
            array = as_array(value)
            if array.dtype.kind not in ("iu" if port.dtype == "i32" else "iuf") or array.ndim != len(shape):
                what = "a number" if not shape else "a list of numbers"
                found = f"input `{port.name}` of sequence {place} is {repr(value)[:80]}"
                raise SpecRTError("RUN-008", f"{found}, expected {what} of type {port.dtype}")
            top = self._bounds.get(port.name)
            if top is not None and array.size and not 0 <= array.min() <= array.max() < top:
                wrong = next(int(one) for one in array.flatten() if not 0 <= one < top)
                message = f"input `{port.name}` of sequence {place} has {wrong}, expected numbers from 0 to {top - 1}"
                raise SpecRTError("RUN-008", message)
            if shape and len(array) != len(row):
                message = f"input `{port.name}` has {len(array)} values for the {len(row)} tokens of sequence {place}"
                raise SpecRTError("RUN-008", message, hint="pass one for each token")

    @staticmethod
    def _cut(port: Port, value: Array, size: int) -> Floats:
        per_token = len(port.shape) > 1 and port.shape[1] == "S"
        return np.array(value[:size] if per_token else value, np.float32)
