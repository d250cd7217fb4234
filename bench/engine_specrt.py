"""SpecRT on OpenVINO, through the runtime's own engine: in-flight batching and paged cache included."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import compiler
import runtime
from worker import seconds, serve

ROUNDED = ("w8a8_block", "w4a8")  # inputs are rounded to 8 bits too, so those of the head


class Engine:
    """A compiled bundle; the same object compiles it, in a process of its own."""

    def compile(self, checkpoint: str, dtype: str, out: str) -> dict[str, Any]:
        """Write the bundle; with low-bit weights the head has 8 bits, as llama.cpp's files have it."""
        stated: dict[str, Any] = {"deployment": 1, "checkpoint": checkpoint, "precision": dtype}
        tied = json.loads((Path(checkpoint) / "config.json").read_text())["tie_word_embeddings"]
        if dtype.startswith("w") and not tied:
            head = "w8a8_block" if dtype in ROUNDED else "w8a16"
            stated["layers"] = [{"linears": "head", "precision": head}]
        deployment = Path(f"{out}.yaml")
        deployment.write_text(yaml.safe_dump(stated))
        begin = time.perf_counter()
        compiler.compile(deployment, out=out)
        return {"compile_s": time.perf_counter() - begin}

    def load(self, artifact: str, threads: int, batch: int, tokens: int, **_: object) -> dict[str, Any]:
        """Load it with a cache for `batch` sequences of up to `tokens` tokens."""
        begin = time.perf_counter()
        self.model = runtime.load(artifact, threads=threads, cache_tokens=batch * (tokens + 64))
        toolchain = dict(self.model.bundle.toolchain)
        return {"load_s": time.perf_counter() - begin, "version": toolchain}

    def prefill(self, prompts: list[list[int]]) -> float:
        """Seconds from the prompts to the first new token of each."""
        return seconds(lambda: self.model.generate(prompts, max_new_tokens=1, stop=()))

    def decode(self, prompts: list[list[int]], steps: int) -> float:
        """Seconds of `steps` greedy steps after the first new token."""
        engine = self.model.engine
        requests = [engine.submit(prompt, max_new_tokens=steps + 1) for prompt in prompts]
        while not all(request.new for request in requests):
            engine.step()
        before = sum(len(request.new) for request in requests)  # prompts of one call may take several steps
        took = seconds(lambda: self._finish(requests))
        made = sum(len(request.new) for request in requests) - before
        return took * steps * len(prompts) / made

    def _finish(self, requests: list[runtime.Request]) -> None:
        while any(request.finish is None for request in requests):
            self.model.engine.step()

    def logits(self, prompt: list[int], out: str) -> None:
        """Save the logits [S, V] of one prompt."""
        np.save(out, self.model.logits([prompt])[0])


if __name__ == "__main__":
    serve(Engine())
