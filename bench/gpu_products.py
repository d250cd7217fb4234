"""Products of every stored type on a real GPU: right, and how near to the memory's and PyTorch's speed.

python bench/gpu_products.py compile FOLDER    anywhere: cubins and cases (triton)
python bench/gpu_products.py run FOLDER OUT    where the GPU is: checks and times into OUT (torch, cuda-bindings)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
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
}
COUNTS = (1, 16, 64, 128, 512, 2048)
# of norms: float16's rounding of the result is 2e-4, that of E4M3's sums in the tensor cores 3e-3 at 11008 terms
BOUND = {"fp8": 4e-3}


def cases() -> Iterator[tuple[str, Any, int, Any]]:
    """Names, products, rows and launches."""
    from compiler.kernels.products import Product, product
    from compiler.kernels.rows import SIZES

    for name, kind in KINDS.items():
        for outs, ins in SHAPES:
            for count in COUNTS:
                asked = Product(outs, ins, out="f16", **kind)
                yield name, asked, count, product(asked, min(size for size in SIZES if size >= count), 90)


def compile_all(folder: Path) -> None:
    """Write cubins and list.json."""
    folder.mkdir(parents=True, exist_ok=True)
    launches: list[Any] = []
    document: dict[str, Any] = {"cases": []}
    for name, asked, count, launch in cases():
        if launch not in launches:
            launches.append(launch)
        constants = launch.constants
        sizes = " ".join(f"{key}={constants[key]}" for key in ("rows", "tile", "depth", "parts") if key in constants)
        document["cases"].append({
            "name": name, "product": asdict(asked), "count": count, "bound": BOUND.get(name, 1e-3),
            "variants": [{"name": sizes, "kernel": launches.index(launch)}],
        })  # fmt: skip
    compile_kernels(folder, launches, document)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    if sys.argv[1] == "compile":
        compile_all(Path(sys.argv[2]))
    else:
        import gpu_products_run

        gpu_products_run.run_all(Path(sys.argv[2]), Path(sys.argv[3]))
