"""What bench/gpu_products.py does on the GPU: every compiled product checked, then timed next to PyTorch's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu_compiled import SPREAD, Compiled, torch_time

BITS = {"f16": 16, "bf16": 16, "i8": 8, "f8e4m3": 8, "i4": 4, "u4": 4, "f4e2m1": 4}


class Bench(Compiled):
    """Products, checked and timed."""

    def __init__(self, folder: Path) -> None:
        import torch

        self.torch = torch
        torch.zeros(1, device="cuda")
        super().__init__(folder)

    # -- operands -------------------------------------------------------------------------------------------------

    def operand(self, dtype: str, *shape: int) -> tuple[Any, Any]:
        """Random values as they are stored, and in float32."""
        torch = self.torch
        if dtype in ("f16", "bf16"):
            stored = torch.randn(*shape, device="cuda").to(torch.float16 if dtype == "f16" else torch.bfloat16)
            return stored, stored.float()
        if dtype == "f8e4m3":
            stored = torch.randn(*shape, device="cuda").to(torch.float8_e4m3fn)
            return stored, stored.float()
        if dtype == "i8":
            stored = torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)
            return stored, stored.float()
        raise ValueError(dtype)

    def words(self, dtype: str, outs: int, ins: int, span: int) -> tuple[Any, Any]:
        """Random codes in words of 16 bits, each of columns that lie as far apart as there are words in a span."""
        torch, held = self.torch, 2 if dtype == "i8" else 4
        words = torch.randint(0, 1 << 16, (outs, ins // span, 1, span // held), device="cuda", dtype=torch.int32)
        bits, mask = 16 // held, (1 << 16 // held) - 1
        codes = torch.cat([words >> bits * part & mask for part in range(held)], 2).reshape(outs, ins)
        if dtype == "i8":
            return words.to(torch.uint16).reshape(outs, -1), codes.to(torch.uint8).view(torch.int8).float()
        values = (codes - 8 if dtype == "i4" else codes).float()
        if dtype == "f4e2m1":
            table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device="cuda")
            values = table[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
        return words.to(torch.uint16).reshape(outs, -1), values

    def product(self, case: dict[str, Any]) -> dict[str, Any]:
        """Times of every tile on one product, and of PyTorch; a wrong result is left out, and said."""
        torch, p, count = self.torch, case["product"], case["count"]
        outs, ins, group = p["outs"], p["ins"], p["group"]
        size = outs * ins * BITS[p["w"]] / 8
        scale_type = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "": torch.float32,
                      "f8e8m0": torch.float8_e8m0fnu}[p["scale"]]  # fmt: skip
        weights, first = [], None
        for number in range(max(2, round(SPREAD / size)) if count <= 128 else 2):
            stored, wide = (self.words(p["w"], outs, ins, case["span"]) if case["span"]
                            else self.operand(p["w"], outs, ins))  # fmt: skip
            scale = torch.rand(ins // group if group else 1, outs, device="cuda")
            scale = torch.exp2(torch.floor(scale * 4 - 4)) if p["scale"] == "f8e8m0" else scale  # of which it has all
            scale = scale.to(scale_type)
            zero = torch.randint(0, 16, scale.shape, device="cuda").to(torch.uint8)
            weights.append((stored, scale, zero))
            if not number:
                blocks = wide.reshape(outs, -1, group or ins)
                blocks = blocks - zero.T.float()[:, :, None] if p["zero"] else blocks
                first = (blocks * scale.T.float()[:, :, None]).reshape(outs, ins) if p["scale"] else wide
        x, wide_x = self.operand(p["x"], count, ins)
        x_scale = torch.rand(count, device="cuda") + 0.5
        whole = wide_x * (x_scale[:, None] if p["x_scale"] == "row" else x_scale[0] if p["x_scale"] else 1.0)
        assert first is not None
        expected = whole @ first.T
        y = torch.empty(count, outs, device="cuda", dtype=torch.bfloat16 if p["out"] == "bf16" else torch.float16)
        shrink = float(60000.0 / expected.abs().max().clamp(min=60000.0))  # into float16's range
        x_scale *= shrink
        weights = [(stored, scale if p["x_scale"] else (scale.float() * shrink).to(scale_type), zero)
                   for stored, scale, zero in weights]  # fmt: skip
        expected *= shrink if p["scale"] or p["x_scale"] else 1.0
        times: dict[str, float] = {}
        errors: dict[str, float] = {}
        for variant in case["variants"]:
            kernel = self.kernel(variant["kernel"])
            splits = kernel.constants.get("splits", 1)
            sums = torch.full((splits if splits > 1 else 0, count, outs), torch.nan, device="cuda")
            calls = [
                partial(self.launch, variant, {
                    "x": x.data_ptr(), "w": w.data_ptr(), "scale": scale.data_ptr(), "zero": zero.data_ptr(),
                    "x_scale": x_scale.data_ptr(), "y": y.data_ptr(), "sums": sums.data_ptr(), "count": count,
                })
                for w, scale, zero in weights
            ]  # fmt: skip
            y.fill_(torch.nan)
            torch.cuda.synchronize()
            calls[0]()
            self.device.wait()
            off = float((y.float() - expected).norm() / expected.norm())
            if off < case["bound"]:
                times[variant["name"]] = self.time(calls)
                errors[variant["name"]] = off
            else:
                print(f"BAD {case['name']} {variant['name']}: off by {off}", flush=True)
        found = {"name": case["name"], "product": p, "count": count, "ms": times, "error": errors,
                 "peers": self.peers(p, x, [w for w, _, _ in weights])}  # fmt: skip
        best = min(times, key=times.__getitem__, default="")
        peer = min(found["peers"].values(), default=float("nan"))
        if not times:
            print(f"{case['name']} {outs}x{ins} T={count}: PyTorch {peer * 1e3:.2f} us", flush=True)
        if best:
            found |= {"best": best, "GB/s": size / times[best] / 1e6,
                      "TFLOP/s": 2 * count * outs * ins / times[best] / 1e9}  # fmt: skip
            rates = f"{found['GB/s']:.0f} GB/s {found['TFLOP/s']:.0f} TFLOP/s"
            print(f"{case['name']} {outs}x{ins} T={count}: {best} {times[best] * 1e3:.2f} us {rates}; "
                  f"PyTorch {peer * 1e3:.2f} us = {peer / times[best]:.2f}x", flush=True)  # fmt: skip
        return found

    def launch(self, variant: dict[str, Any], values: dict[str, int]) -> None:
        """A product, and what joins its splits."""
        kernel = self.kernel(variant["kernel"])
        splits = kernel.constants.get("splits", 1)
        self.over(kernel, values | ({"y": values["sums"]} if splits > 1 else {}), splits)
        if splits > 1:
            self.over(self.kernel(variant["join"]), values)

    def over(self, kernel: Any, values: dict[str, int], splits: int = 1) -> None:
        """Launch a kernel over all outs and rows."""
        constants = kernel.constants
        grid = (-(-constants["outs"] // constants["tile"]), -(-values["count"] // constants["rows"]), splits)
        kernel.launch(grid, values)

    def peers(self, p: dict[str, Any], x: Any, weights: Sequence[Any]) -> dict[str, float]:
        """Milliseconds of PyTorch's products of the same operands, where it has them."""
        torch = self.torch
        ones = partial(torch.ones, device="cuda")
        found: dict[str, Callable[..., Any]] = {}
        if p["w"] in ("f16", "bf16"):
            found["linear"] = torch.nn.functional.linear
        elif p["x"] == "f8e4m3":
            rows, outs = ones(len(x), 1), ones(1, p["outs"])
            for fast in (True, False):
                found[f"scaled_mm rows fast={fast}"] = lambda x, w, fast=fast: torch._scaled_mm(
                    x, w.T, rows, outs, out_dtype=torch.bfloat16, use_fast_accum=fast)  # fmt: skip
            one = ones(1)[0]
            found["scaled_mm tensor"] = lambda x, w: torch._scaled_mm(
                x, w.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)  # fmt: skip
        elif p["x"] == "i8":
            found["int_mm"] = lambda x, w: torch._int_mm(x, w.T)
        times = {}
        for name, call in found.items():
            try:
                times[name] = torch_time([partial(call, x, w) for w in weights])
            except RuntimeError as error:
                print(f"{name}: {str(error)[:100]}", flush=True)
        return times


def run_all(folder: Path, out: Path) -> None:
    """Check and time every case; OUT gets everything as JSON after each."""
    bench = Bench(folder)
    device = bench.device
    result: dict[str, Any] = {"gpu": device.name, "sm": device.capability, "products": []}
    for case in bench.list["cases"]:
        result["products"].append(bench.product(case))
        out.write_text(json.dumps(result, indent=1))
        bench.torch.cuda.empty_cache()
    device.close()
