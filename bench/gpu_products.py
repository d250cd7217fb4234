"""Products of every stored type on a real GPU: right, and how near to the memory's and PyTorch's speed.

python bench/gpu_products.py compile FOLDER [KIND...]   anywhere: cubins and cases (triton)
python bench/gpu_products.py run FOLDER OUT             where the GPU is: checks and times (torch, cuda-bindings)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_compiled import compile_kernels

SHAPES = [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)]  # q k v, out, gate and up, down of 4096 x 32
KINDS: dict[str, dict[str, Any]] = {
    "f16": {"x": "f16", "w": "f16"},
    "fp8": {"x": "f8e4m3", "w": "f8e4m3", "scale": "f32", "x_scale": "row"},
    "w8a8": {"x": "i8", "w": "i8", "scale": "f32", "x_scale": "row"},
    "w8a16": {"x": "f16", "w": "i8", "scale": "f32"},
    "w4a16": {"x": "f16", "w": "i4", "scale": "f16", "group": 128},
    "w4a16 zero": {"x": "f16", "w": "u4", "scale": "f16", "group": 128, "zero": True},
    "w4a16 bf16": {"x": "bf16", "w": "i4", "scale": "bf16", "group": 128, "out": "bf16"},
    "mxfp4 bf16": {"x": "bf16", "w": "f4e2m1", "scale": "f8e8m0", "group": 32, "out": "bf16"},
}
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
# of norms: float16's rounding of the result is 2e-4 (bfloat16's 8 times that), and of each weight as much again; that
# of E4M3's sums in the tensor cores 3e-3 at 11008 terms
BOUND = {"fp8": 4e-3, "w4a16 bf16": 8e-3, "mxfp4 bf16": 8e-3}


SIZES_OF = ("rows", "tile", "depth", "parts", "splits")  # constants that say which tiles a kernel has


def cases(kinds: Sequence[str]) -> Iterator[tuple[str, Any, int, Any]]:
    """Names, products, rows and launches."""
    from compiler.kernels.products import Product, product
    from compiler.kernels.rows import SIZES

    for name in kinds or KINDS:
        for outs, ins in SHAPES:
            for count in COUNTS:
                asked = Product(outs, ins, **({"out": "f16"} | KINDS[name]))
                yield name, asked, count, product(asked, min(size for size in SIZES if size >= count), 90)


def compile_all(folder: Path, kinds: Sequence[str]) -> None:
    """Write cubins and list.json."""
    from compiler.kernels.products import SPAN, in_words, joined

    folder.mkdir(parents=True, exist_ok=True)
    launches: dict[str, Any] = {}

    def number(launch: Any) -> int:
        launches.setdefault(repr(launch), launch)
        return list(launches).index(repr(launch))

    document: dict[str, Any] = {"cases": []}
    for name, asked, count, launch in cases(kinds):
        constants = launch.constants
        sizes = " ".join(f"{key}={constants[key]}" for key in SIZES_OF if key in constants)
        variant = {"name": f"{launch.name} {sizes}", "kernel": number(launch)}
        if constants.get("splits", 1) > 1:
            variant["join"] = number(joined(asked, constants["splits"]))
        document["cases"].append({
            "name": name, "product": asdict(asked), "count": count, "bound": BOUND.get(name, 1e-3),
            "variants": [variant], "span": SPAN if in_words(asked.x, asked.w, asked.group) else 0,
        })  # fmt: skip
    compile_kernels(folder, list(launches.values()), document)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    if sys.argv[1] == "compile":
        compile_all(Path(sys.argv[2]), sys.argv[3:])
    else:
        import gpu_products_run

        gpu_products_run.run_all(Path(sys.argv[2]), Path(sys.argv[3]))
