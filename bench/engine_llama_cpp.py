"""llama.cpp through the C functions of llama-cpp-python: prompts in one batch, greedy by argmax."""

from __future__ import annotations

import time
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from worker import seconds, serve


class Engine:
    """One context with a KV stream for each sequence; its KV cache is float16, as by default."""

    def load(self, artifact: str, threads: int, batch: int, tokens: int, vocab: int, **_: object) -> dict[str, Any]:
        """Map the file and make a context for `batch` sequences of up to `tokens` tokens each."""
        begin = time.perf_counter()
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(artifact.encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {artifact}")
        limits = llama_cpp.llama_context_default_params()
        limits.n_ctx = batch * tokens
        limits.n_seq_max = batch
        limits.n_batch = limits.n_ubatch = 1024
        limits.n_threads = limits.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, limits)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")
        self.batch = llama_cpp.llama_batch_init(1024, 0, 1)
        self.vocab = vocab
        features = llama_cpp.llama_print_system_info().decode()
        return {"load_s": time.perf_counter() - begin, "version": llama_cpp.__version__, "features": features}

    def _run(self, rows: list[tuple[int, int, int, bool]]) -> NDArray[np.float32]:
        """Evaluate (token, position, sequence, wanted) rows; the logits of the wanted ones, [N, V]."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = wanted
        code = llama_cpp.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        wanted_rows = [index for index, row in enumerate(rows) if row[3]]
        pointers = [llama_cpp.llama_get_logits_ith(self.context, index) for index in wanted_rows]
        return np.stack([np.ctypeslib.as_array(pointer, shape=(self.vocab,)) for pointer in pointers])

    def _first(self, prompts: list[list[int]]) -> list[int]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        return [int(token) for token in self._run(rows).argmax(-1)]

    def _decode(self, tokens: list[int], position: int, steps: int) -> None:
        for step in range(steps):
            rows = [(token, position + step, sequence, True) for sequence, token in enumerate(tokens)]
            tokens = [int(token) for token in self._run(rows).argmax(-1)]

    def prefill(self, prompts: list[list[int]]) -> float:
        """Seconds from the prompts to the first new token of each."""
        return seconds(lambda: self._first(prompts))

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Seconds of `steps` greedy steps after the first new token."""
        tokens = self._first(prompts)
        return seconds(lambda: self._decode(tokens, len(prompts[0]), steps))

    def logits(self, prompt: list[int], out: str) -> None:
        """Save the logits [S, V] of one prompt."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        np.save(out, self._run([(token, position, 0, True) for position, token in enumerate(prompt)]))


if __name__ == "__main__":
    serve(Engine())
