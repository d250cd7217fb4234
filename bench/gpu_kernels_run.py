"""What bench/gpu_kernels.py does on the GPU: cases with numpy alone, then speed next to PyTorch's own kernels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpu_compiled import SPREAD, Compiled, torch_time
from runtime.cuda.batch import programs_for, splits_for
from runtime.cuda.kernels import Kernel

Grid = tuple[int, int, int]
CODES = ("u8", "f8e4m3")
DECODE = [(1, 256), (1, 2048), (1, 16384), (8, 2048), (64, 256), (64, 2048)]
PREFILL = [(16, 128), (64, 128), (1, 2048), (4, 2048), (1, 8192)]


class Bench(Compiled):
    """Attention, checked and timed."""

    def put(self, array: np.ndarray[Any, Any]) -> int:
        address = self.device.allocate(array.nbytes)
        self.device.upload(address, np.ascontiguousarray(array))
        self.device.wait()
        return address

    def cases(self) -> list[dict[str, Any]]:
        """Run every case; each result says how far off it is, and how far it may be."""
        arrays = np.load(self.folder / "arrays.npz")
        found = []
        for number, case in enumerate(self.list["cases"]):
            prefix = f"{number}."
            values = {key[len(prefix) :]: self.put(arrays[key]) for key in arrays if key.startswith(prefix)}
            values |= case["numbers"]
            for name, start in zip("qkv", case["starts"], strict=True):
                values[name] = values["row"] + start
            for index, grid in case["launches"]:
                self.kernel(index).launch(grid, values)
            expected = arrays[prefix + "expected"]
            kind = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[case["dtype"]]
            host = np.empty(expected.shape, kind)
            self.device.download(host, values["out"])
            self.device.wait()
            got = (host.astype(np.uint32) << 16).view(np.float32) if case["dtype"] == "bf16" else host
            difference = np.abs(got.astype(np.float64) - expected)
            excess = float((difference - case["absolute"] - case["relative"] * np.abs(expected)).max())
            good = bool(excess <= 0)  # NaN is not
            found.append({"case": case["name"], "off": float(difference.max()), "right": good})
            print(f"{'ok  ' if good else 'BAD '} {case['name']:20s} off by {difference.max():.2e}")
        return found


def copy_bandwidth() -> float:
    """GB/s of a large copy on the device, bytes read and written."""
    import torch

    source = torch.randn(1 << 30, dtype=torch.float16, device="cuda")
    target = torch.empty_like(source)
    # a product with 1 runs as a kernel; `copy_` in a graph is a memory copy node, which moved 2.7 of 4.3 TB/s here
    return 4 * source.numel() / torch_time([partial(torch.mul, source, 1.0, out=target)]) / 1e6


def attentions(bench: Bench, what: Sequence[str]) -> list[dict[str, Any]]:
    """Decode and prefill in all variants that were compiled, and PyTorch's best."""
    return [
        one_attention(bench, kind, groups, batch, length)
        for kind, shapes in (("decode", DECODE), ("prefill", PREFILL))
        if kind in what
        for groups in (32, 8)
        for batch, length in shapes
    ]


def one_attention(bench: Bench, kind: str, groups: int, batch: int, length: int) -> dict[str, Any]:
    """Times of every variant on one shape."""
    import torch

    half: dict[str, Any] = {"dtype": torch.float16, "device": "cuda"}
    blocks = batch * length // 64
    size = blocks * groups * 64 * 128 * 2 * 2
    caches = [torch.randn(2, blocks, groups, 64, 128, **half) for _ in range(max(1, min(20, round(SPREAD / size))))]
    # of 8-bit caches: the values do not matter, but there are as many bytes
    coded = [torch.zeros(2, blocks, groups, 64, 136, dtype=torch.uint8, device="cuda") for _ in range(len(caches))]
    new = 1 if kind == "decode" else length

    def ints(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    held = {
        "past_lens": ints([length - new] * batch), "block_ids": ints(torch.randperm(blocks).tolist()),
        "seq_begins": ints([new * i for i in range(batch + 1)]),
        "block_begins": ints([length // 64 * i for i in range(batch + 1)]),
        "slots": ints([length - 1 + length * i for i in range(batch)]),  # a place of its own for each
        "ended": torch.zeros(batch * groups, dtype=torch.int32, device="cuda"),
        "cos": torch.ones(batch * new, 64, device="cuda"), "sin": torch.zeros(batch * new, 64, device="cuda"),
        "parts": torch.empty(batch * 32 * 32 * 128, device="cuda"),
        "tops": torch.empty(2 * batch * 32 * 32, device="cuda"),
        "q": torch.randn(batch * new, (32 + 2 * groups) * 128, **half),
        "out": torch.empty(batch * new, 32, 128, **half),
    }  # fmt: skip
    base = {name: x.data_ptr() for name, x in held.items()}
    base |= {"k": base["q"] + 2 * 4096, "v": base["q"] + 2 * (4096 + groups * 128)}
    values = [base | {"k_cache": c[0].data_ptr(), "v_cache": c[1].data_ptr()} for c in caches]
    over_codes = [base | {"k_cache": c[0].data_ptr(), "v_cache": c[1].data_ptr()} for c in coded]
    times, off, first = {}, {}, None
    for variant in bench.list["speed"]:
        if variant["groups"] != groups or not variant["name"].startswith(kind):
            continue
        kernel = bench.kernel(variant["kernel"])
        launches = [(kernel, (32, 0, 1))]
        if kind == "decode":
            split = int(variant["name"].split()[0].removeprefix("decode"))
            if split > max(1, length // 64):
                continue
            launches = [(kernel, (batch, groups, split))]
        else:
            starts = range(0, length, variant["rows"])
            pairs = [(row, start) for start in reversed(starts) for row in range(batch)]
            held["rows"], held["starts"] = ints([row for row, _ in pairs]), ints([start for _, start in pairs])
            tiles = {"tile_rows": held["rows"].data_ptr(), "tile_starts": held["starts"].data_ptr()}
            tiles["tiles"] = len(pairs)
            values, over_codes = ([one | tiles for one in each] for each in (values, over_codes))
            launches = [(kernel, (32, len(pairs), 1))]
            if "shared" in variant:  # by as many programs as the runtime takes, and the other way
                usual = programs_for(32, len(pairs), batch, length, 4 * groups * 128, bench.device.multiprocessors)
                other = 32 * len(pairs) if usual == bench.device.multiprocessors else bench.device.multiprocessors
                programs = {"": usual, " otherwise": other}
        torch.cuda.synchronize()
        given = over_codes if "codes" in variant else values
        for suffix, count in programs.items() if "shared" in variant else [("", 0)]:
            chosen = [(kernel, (count, 1, 1))] if count else launches
            times[variant["name"] + suffix] = bench.time([partial(_launch, chosen, one) for one in given])
            if kind == "prefill" and "codes" not in variant:
                first = held["out"].clone() if first is None else first
                off[variant["name"] + suffix] = float((held["out"].float() - first.float()).abs().max())
                held["out"].fill_(torch.nan)
                torch.cuda.synchronize()
    peers = library_attention(kind, groups, batch, length, len(caches))
    best = min((name for name in times if name.split()[-1] not in CODES), key=times.__getitem__)
    coded_best = {
        codes: min((times[name], name) for name in times if name.endswith(codes)) for codes in CODES
    }  # fmt: skip
    peer = min((x for x in peers.values() if isinstance(x, float)), default=float("nan"))
    flops = 2 * batch * 32 * 128 * length * length if kind == "prefill" else 0
    rate = {"GB/s": size / times[best] / 1e6} if kind == "decode" else {"TFLOP/s": flops / times[best] / 1e9}
    if off:
        print({name: f"{ms * 1e3:.1f}" for name, ms in times.items()}, f"off by {sorted(off.values())}")
    print(f"{kind} K={groups} B={batch} S={length}: {best} {times[best]:.4f} ms, PyTorch {peer:.4f} = "
          f"{peer / times[best]:.2f}x, {rate}", flush=True)  # fmt: skip
    for codes, (taken, name) in coded_best.items():
        print(f"    {codes}: {name} {taken:.4f} ms, {times[best] / taken:.2f}x the speed of float16", flush=True)
    return {
        "kind": kind, "groups": groups, "batch": batch, "length": length, "ms": times, "best": best, "peers": peers,
        **({"off": off} if off else {}),
        "codes": {codes: {"ms": taken, "best": name} for codes, (taken, name) in coded_best.items()},
        "default": f"decode{splits_for(batch, groups, length // 64, bench.device.multiprocessors)}", **rate,
    }  # fmt: skip


def _launch(launches: Sequence[tuple[Kernel, Grid]], values: dict[str, int]) -> None:
    for kernel, grid in launches:
        kernel.launch(grid, values)


def library_attention(kind: str, groups: int, batch: int, length: int, sets: int) -> dict[str, Any]:
    """Milliseconds of PyTorch's attention by backend, over a dense cache; the reason where a backend refuses."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    half: dict[str, Any] = {"dtype": torch.float16, "device": "cuda"}
    new = 1 if kind == "decode" else length
    q = torch.randn(batch, 32, new, 128, **half)
    dense = [torch.randn(2, batch, groups, length, 128, **half) for _ in range(sets)]
    call = partial(torch.nn.functional.scaled_dot_product_attention, q, is_causal=new > 1, enable_gqa=groups != 32)
    found: dict[str, Any] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            try:
                found[backend.name] = torch_time([partial(call, one[0], one[1]) for one in dense])
            except RuntimeError as error:
                found[backend.name] = str(error)[:80]
    return found


def run_all(folder: Path, out: Path, what: Sequence[str]) -> None:
    """Check, then time; OUT gets everything as JSON after each part."""
    bench = Bench(folder)
    device = bench.device
    result: dict[str, Any] = {"gpu": device.name, "sm": device.capability, "multiprocessors": device.multiprocessors}
    result["cases"] = bench.cases()
    out.write_text(json.dumps(result, indent=1))
    if {"decode", "prefill"} & set(what):
        result["copy GB/s"] = copy_bandwidth()
        print(f"copy {result['copy GB/s']:.0f} GB/s")
        result["attention"] = attentions(bench, what)
        out.write_text(json.dumps(result, indent=1))
    device.close()
