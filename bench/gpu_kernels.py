"""The kernels on a real GPU: right on every feature, and how near to the memory's and the library's speed.

python bench/gpu_kernels.py compile FOLDER [decode] [prefill]    anywhere: cubins, cases and what they must give, for
    what is named or all (triton, torch)
python bench/gpu_kernels.py run FOLDER OUT [cases] [decode] [prefill]    where the GPU is: checks, and times of what
    is named or of all, into OUT (torch, cuda-bindings)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gpu_compiled import compile_kernels

BOTH = ("decode", "prefill")
NUMBERS = ("first", "tiles")  # arguments of kernels that are no addresses
DIMS = {"heads": 32, "groups": 32, "dim": 128}
PREFILL_TILES = [(128, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3)]
HOPPER: list[dict[str, Any]] = [
    {}, {"order": False}, {"queries": 1, "stages": 3}, {"queries": 1, "stages": 3, "order": False},
]  # fmt: skip


def speed_attention(groups: int) -> Any:
    """The attention whose speed is measured: 32 heads of 128, FP16, blocks of 64."""
    from compiler.kernels.attention import Attention

    width = (32 + 2 * groups) * 128
    return Attention(
        dtype="f16", cache_dtype="f16", heads=32, groups=groups, dim=128, wide=128, block=64, scale=128**-0.5,
        causal=True, q=(0, width, 128), k=(4096, width, 128), v=(4096 + groups * 128, width, 128), pairs=64,
    )  # fmt: skip


def cases() -> Iterator[tuple[str, Any, list[tuple[int, int]], int]]:
    """Names, attentions, batches and splits that are checked."""
    from tests.kernels.cases import FEATURES, SEQUENCES, attention

    for dtype in ("f32", "f16", "bf16"):
        yield f"{dtype} plain", attention(dtype=dtype), SEQUENCES, 1
        yield f"{dtype} all", attention(FEATURES, dtype=dtype), SEQUENCES, 4
    yield "f32 window", attention(("window",)), SEQUENCES, 4
    yield "f32 biases in bfloat16", attention(("slopes",), bf16_bias=0.05), [(271, 1), (3, 1), (60, 4)], 4
    yield "f32 prefix", attention(("prefix",)), SEQUENCES, 1
    yield "f32 two sides", attention(causal=False), SEQUENCES, 1
    yield "f32 interleaved", attention(style="interleaved", pairs=12), SEQUENCES, 1
    yield "f16 80", attention(dtype="f16", dim=80, pairs=20), SEQUENCES, 1
    yield "f16 256", attention(dtype="f16", dim=256, pairs=128), SEQUENCES, 4
    yield "f32 256", attention(dim=256, pairs=128), SEQUENCES, 1
    yield "f16 one key head", attention(dtype="f16", heads=20, groups=1, dim=64), [*SEQUENCES, (3, 200)], 4
    yield "f16 48 and 32", attention(dtype="f16", dim=48, wide=32, pairs=8), SEQUENCES, 1
    for codes in ("u8", "f8e4m3"):
        yield f"f32 {codes}", attention(codes=codes), SEQUENCES, 1
        yield f"f32 {codes} all", attention(FEATURES, codes=codes), SEQUENCES, 4
        yield f"f16 {codes} one key head", attention(dtype="f16", heads=20, groups=1, dim=64, codes=codes), SEQUENCES, 4
        yield f"bf16 {codes} 80 and 48", attention(dtype="bf16", dim=80, wide=48, pairs=8, codes=codes), SEQUENCES, 1
    yield "f16 128", attention(dtype="f16", dim=128, pairs=64), [(0, 1), (90, 1), (100, 130)], 4
    yield "bf16 128", attention(dtype="bf16", dim=128, pairs=64), [(0, 1), (7, 300)], 4
    yield "f16 128 two sides", attention(dtype="f16", dim=128, causal=False), [(0, 1), (100, 130), (0, 5)], 1
    for names in (("window",), ("prefix",), ("sinks",), ("window", "prefix", "sinks")):
        a = attention(names, dtype="f16", dim=64, pairs=32)
        yield f"f16 64 {' '.join(names)}", a, [*SEQUENCES, (3, 200)], 4
    yield "bf16 64 long window", attention(dtype="bf16", dim=64, window=150), [(0, 1), (9, 290), (0, 40)], 1


def speed(groups: int) -> Iterator[tuple[dict[str, Any], Any]]:
    """Kernels that are timed: how they are named and launched."""
    from compiler.kernels import attention as lib

    a = speed_attention(groups)
    for split in lib.SPLITS:
        yield {"name": f"decode{split}"}, lib.decode(a, split)
    for codes in ("u8", "f8e4m3"):
        coded = replace(a, codes=codes, cache_dtype="u8")
        for split in lib.SPLITS:
            yield {"name": f"decode{split} {codes}", "codes": codes}, lib.decode(coded, split)
        launch = lib.prefill(coded)
        yield {"name": f"prefill {codes}", "codes": codes, "rows": launch.constants["rows"]}, launch
    base = lib.prefill(a)
    for rows, tile, warps, stages in PREFILL_TILES:
        launch = replace(base, constants=base.constants | {"rows": rows, "tile": tile}, warps=warps, stages=stages)
        yield {"name": f"prefill {rows} {tile} {warps} {stages}", "rows": rows}, launch
    base = lib.prefill_hopper(a)
    for changes in HOPPER:
        constants = base.constants | changes
        launch = replace(base, constants=constants, stages=constants["stages"])
        yield {"name": f"prefill sm90 {changes}", "rows": constants["rows"], "shared": True}, launch
    for split in (1, 4):
        base = lib.decode(a, split)
        for tile, warps, stages in ((64, 4, 2), (64, 4, 4), (128, 4, 2), (128, 8, 3), (32, 4, 4), (64, 2, 3)):
            launch = replace(base, constants=base.constants | {"tile": tile}, warps=warps, stages=stages)
            yield {"name": f"decode{split} {tile} {warps} {stages}"}, launch


def compile_all(folder: Path, what: Sequence[str]) -> None:
    """Write cubins, arrays and list.json."""
    import torch

    from compiler.kernels import attention as lib
    from tests.conformance.tolerances import tolerance
    from tests.kernels.cases import Case

    folder.mkdir(parents=True, exist_ok=True)
    jobs: list[lib.Launch] = []
    document: dict[str, Any] = {"cases": [], "speed": []}
    arrays: dict[str, np.ndarray[Any, Any]] = {}

    def bits(x: torch.Tensor) -> np.ndarray[Any, Any]:
        return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()

    for number, (name, a, sequences, splits) in enumerate(cases()):
        case = Case(a, sequences)
        expected = case.expected().float().numpy()
        launches, values = case.launches(splits, 90)
        used = {argument for launch, _ in launches for argument, kind in launch.arguments if kind}
        for key in used - {"q", "k", "v", *NUMBERS}:
            arrays[f"{number}.{key}"] = bits(values[key].contiguous())
        arrays[f"{number}.row"], arrays[f"{number}.expected"] = bits(case.row), expected
        bound = tolerance("paged_attention", a.dtype)
        terms = max(1.0, a.dim / 48)  # the table is for sums of 48
        size = 4 if a.dtype == "f32" else 2
        document["cases"].append({
            "name": name, "dtype": a.dtype, "splits": splits, "absolute": bound.absolute * terms,
            "relative": bound.relative * terms,
            "numbers": {name: values[name] for name in NUMBERS if name in values},
            "starts": [a.q[0] * size, a.k[0] * size, a.v[0] * size],
            "launches": [[len(jobs) + place, list(grid)] for place, (_, grid) in enumerate(launches)],
        })  # fmt: skip
        jobs += [launch for launch, _ in launches]
    for groups in (32, 8):
        for entry, launch in speed(groups):
            if str(entry["name"]).startswith(tuple(what)):
                document["speed"].append({"groups": groups, "kernel": len(jobs)} | entry)
                jobs.append(launch)
    compile_kernels(folder, jobs, document)
    np.savez_compressed(folder / "arrays.npz", **arrays)  # type: ignore[arg-type]  # numpy types only its options


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    command, folder, *rest = sys.argv[1:]
    if command == "compile":
        compile_all(Path(folder), rest or BOTH)
    else:
        import gpu_kernels_run

        gpu_kernels_run.run_all(Path(folder), Path(rest[0]), rest[1:] or BOTH)
