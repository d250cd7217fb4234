"""The peer of bench/gpu.py on the same GPU: transformers, FP16, static cache, compiled; random weights of one shape.

python bench/gpu_peer.py OUT.json llama|gptj INxOUTxBATCH ...    needs PyTorch and transformers, compiles for a minute
torchrun --nproc-per-node 2 bench/gpu_peer.py OUT.json ...       over two GPUs (`tp_plan="auto"`), by way of /dev/shm
PEER_CACHE=dynamic                                               in front: without a static cache, which is not compiled
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
CACHE = os.environ.get("PEER_CACHE", "static")


def model_of(shape: str) -> Any:
    """A 7B or 6B model with random weights on the GPU."""
    import torch
    from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig

    config = (
        LlamaConfig(max_position_embeddings=4096) if shape == "llama" else GPTJConfig(n_positions=4096)
    )  # the defaults are LLaMA-7B and GPT-J-6B
    if RANKS == 1:
        with torch.device("cuda"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
    torch.cuda.set_device(RANK)
    torch.distributed.init_process_group("nccl", device_id=torch.device("cuda", RANK))
    folder = Path("/dev/shm/peer")
    if RANK == 0:  # only what is read from files is divided
        with torch.device("cuda"):
            AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
        torch.cuda.empty_cache()
    torch.distributed.barrier()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, tp_plan="auto").eval()
    torch.distributed.barrier()
    if RANK == 0:
        shutil.rmtree(folder)
    return model


def main(out: Path, shape: str, workloads: list[str]) -> None:
    """Time the workloads: the second of two equal calls of `generate`, after one that compiles."""
    import torch
    import transformers

    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"), "model": shape, "gpus": RANKS, "cache": CACHE,
    }  # fmt: skip
    model = model_of(shape)
    for workload in workloads:
        length, new, count = map(int, workload.split("x"))
        torch.manual_seed(0)  # the same on all ranks
        ids = torch.randint(0, 30000, (count, length), device="cuda")
        options: dict[str, Any] = {
            "max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0,
            "cache_implementation": CACHE, "attention_mask": torch.ones_like(ids),
        }  # fmt: skip
        seconds = []
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(ids, **options)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        result[workload] = {"tokens/s": count * new / min(seconds), "seconds": seconds}
        if RANK:
            continue
        print(f"transformers {shape} {workload}: {count * new / min(seconds):.0f} tokens/s", flush=True)
        out.write_text(json.dumps(result, indent=1))
    if RANKS > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
