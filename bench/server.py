"""What the server costs on the CPU: tokens/s of the same requests in process, whole and streamed by `specrt serve`.

python bench/server.py    prints the table of docs/speed.md

All requests of a round begin together and none waits in the queue. The client shares the machine's cores with the
server, as one on another machine would not: what the table shows is the most that serving costs here.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import compiler
import runtime

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo" / "tiny-llama"
PROMPT, NEW, CLIENTS, ROUNDS = 64, 96, (1, 8), 7
WIDE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 12, "head_dim": 64}  # fmt: skip
HOW = {"max_tokens": NEW, "temperature": 0, "ignore_eos": True}


def bundles(work: Path) -> dict[str, Path]:
    """The demo model, and one whose steps take as long as those of models that people serve on CPUs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    wide = work / "wide"
    config = json.loads((DEMO / "config.json").read_text()) | WIDE
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(wide)
    (wide / "tokenizer.json").symlink_to(DEMO / "tokenizer.json")
    most = max(CLIENTS)
    return {
        "demo, 5M": compiler.compile(DEMO, out=work / "demo-bundle", max_batch=most, max_sequence=256),
        "random, 88M": compiler.compile(wide, out=work / "wide-bundle", max_batch=most, max_sequence=256),
    }


async def ask(port: int, prompt: list[int], stream: bool) -> float:
    """One request, read to its end; gives seconds to the first byte of its answer's text."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"prompt": prompt, "stream": stream, **HOW}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    first, answer = 0.0, b""
    while piece := await reader.read(65536):
        answer += piece
        first = first or (time.perf_counter() - began if b'"text"' in answer else 0.0)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
    assert answer.count(b'"finish_reason":"length"') == 1, answer[-300:]
    return first


def served(port: int, prompts: list[list[int]], stream: bool) -> float:
    """All at once; gives the median of the seconds to the first token."""

    async def together() -> list[float]:
        return await asyncio.gather(*(ask(port, prompt, stream) for prompt in prompts))

    return statistics.median(asyncio.run(together()))


def in_process(model: runtime.Model, prompts: list[list[int]]) -> float:
    """The same in this process."""
    began = time.perf_counter()
    first = [0.0] * len(prompts)
    for event in model.stream(prompts, max_new_tokens=NEW, stop=()):
        first[event.row] = first[event.row] or time.perf_counter() - began
    return statistics.median(first)


def measure(name: str, bundle: Path) -> None:
    """Rows of the table; ways take turns, so that what else the machine does meets all of them."""
    command = [sys.executable, "-m", "compiler.cli", "serve", str(bundle), "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None  # it is a pipe
        told = server.stderr.readline()
        found = re.search(r":(\d+)/v1", told)
        assert found, told
        port = int(found[1])
        with runtime.load(bundle) as model:
            for clients in CLIENTS:
                generator = np.random.default_rng(clients)
                prompts = [generator.integers(3, 4096, PROMPT).tolist() for _ in range(clients)]
                ways: dict[str, Callable[[], float]] = {
                    "in process": lambda prompts=prompts: in_process(model, prompts),  # type: ignore[misc]
                    "whole": lambda prompts=prompts: served(port, prompts, stream=False),  # type: ignore[misc]
                    "streamed": lambda prompts=prompts: served(port, prompts, stream=True),  # type: ignore[misc]
                }
                print(_row(name, clients, ways), flush=True)
    finally:
        server.terminate()
        server.wait()


def _row(name: str, clients: int, ways: dict[str, Callable[[], float]]) -> str:
    rates: dict[str, list[float]] = {way: [] for way in ways}
    firsts: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(ROUNDS + 1):
        for way, run in ways.items():
            began = time.perf_counter()
            first = run()
            if turn:  # the first warms up
                rates[way].append(clients * NEW / (time.perf_counter() - began))
                firsts[way].append(first * 1000)
    cells = [f"{statistics.median(each):,.0f} ({min(each):,.0f}-{max(each):,.0f})" for each in rates.values()]
    base = rates["in process"]
    ratios = [statistics.median(a / b for a, b in zip(rates[way], base, strict=True)) for way in ("whole", "streamed")]
    ttft = [f"{statistics.median(firsts[way]):.0f}" for way in ("in process", "streamed")]
    return f"| {name} | {clients} | {' | '.join(cells)} | {ratios[0]:.2f} / {ratios[1]:.2f} | {' / '.join(ttft)} |"


def main() -> None:
    """The table, and how busy the machine was."""
    print("| model | clients | in process | whole answers | streamed | served / in process | first token, ms |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, bundle in bundles(Path(folder)).items():
            measure(name, bundle)
    print(f"\nload of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
