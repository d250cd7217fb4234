"""transformers, eager, default attention: a forward loop with its cache, without the cost of its `generate`."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from worker import seconds, serve


class Engine:
    """The model in PyTorch; all prompts of a call have one length, so no padding is needed."""

    def load(self, checkpoint: str, dtype: str, threads: int, **_: object) -> dict[str, Any]:
        """Read the weights in `dtype`."""
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        begin = time.perf_counter()
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
        if dtype not in kinds:
            raise ValueError(f"{dtype}: not on a CPU")
        kind = kinds[dtype]
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=kind).eval()
        return {"load_s": time.perf_counter() - begin}

    def _first(self, prompts: list[list[int]]) -> None:
        result = self.model(input_ids=torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        self.cache, self.tokens = result.past_key_values, result.logits[:, -1:].argmax(-1)

    def _step(self) -> None:
        result = self.model(input_ids=self.tokens, past_key_values=self.cache, use_cache=True)
        self.cache, self.tokens = result.past_key_values, result.logits[:, -1:].argmax(-1)

    def prefill(self, prompts: list[list[int]]) -> float:
        """Seconds from the prompts to the first new token of each."""
        return seconds(lambda: self._first(prompts))

    def _steps(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Seconds of `steps` greedy steps after the first new token."""
        self._first(prompts)
        return seconds(lambda: self._steps(steps))

    def logits(self, prompt: list[int], out: str) -> None:
        """Save the logits [S, V] of one prompt."""
        np.save(out, self.model(input_ids=torch.tensor([prompt])).logits[0].float().numpy())


if __name__ == "__main__":
    serve(Engine())
