"""Every family's tiny model on a real GPU: its engines' logits and greedy ids against the reference in float32.

    python bench/gpu_families.py make FOLDER [SPEC ...]     here: bundles for sm90, and what `run` compares with
    python bench/gpu_families.py run FOLDER OUT.json        where the GPU is; needs no PyTorch
    python bench/gpu_families.py records OUT.json           here: the same as evidence, into docs/evidence/gpu

The reference is the interpreter on the plain equations; in float16 its own error is the measure (a factor of at most 2
is asked for). Greedy ids are those of the CPU engine in float32, which tests/families holds to the original's.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TARGET, TOOLCHAIN = "sm90", "tensorrt-8.6"
PRECISIONS = ("fp32", "fp16")
NEW = 16
FACTOR = 2.0  # times the reference's own error in float16
FP32 = 1e-3  # greatest absolute error of a float32 engine's output


def make(folder: Path, names: list[str]) -> None:
    """A bundle for each spec and precision with its random weights inside, and expected.npz."""
    import compiler
    import runtime
    from compiler.validate.expect import expect
    from specs.errors import SpecRTError

    refused: dict[str, str] = {}
    for path in sorted((ROOT / "specs" / "models").glob("*.yaml")):
        if names and path.stem not in names:
            continue
        home = folder / path.stem
        home.mkdir(parents=True, exist_ok=True)
        plain = compiler.prepare(path, size="tiny", weights="random", precision="fp32")
        weights = _weights(plain)
        expected = expect(plain, weights)
        halves = expect(plain, weights, expected.rows, graph=_in_float16(plain)).judged
        arrays: dict[str, Any] = {"output": np.array(expected.name)}
        for index, (row, found, half) in enumerate(zip(expected.rows, expected.judged, halves, strict=True)):
            arrays |= {f"p{index}": np.array(row, np.int32), f"r{index}": found, f"h{index}": half}
        if plain.role == "decoder":
            with runtime.load(compiler.compile(path, size="tiny", weights="random", out=home / "cpu")) as model:
                for index, ids in enumerate(model.generate(expected.rows, max_new_tokens=NEW, stop=())):
                    arrays[f"g{index}"] = np.array(ids, np.int32)
        np.savez_compressed(home / "expected.npz", **arrays)
        for precision in PRECISIONS:
            try:
                _bundle(path, precision, home / precision)
            except SpecRTError as error:
                refused[f"{path.stem} {precision}"] = str(error)
                print(f"{path.stem} {precision}: {error}", flush=True)
    (folder / "refused.json").write_text(json.dumps(refused, indent=1))


def _weights(prepared: Any) -> Any:
    from compiler.api import float_weights

    return float_weights(prepared)


def _in_float16(plain: Any) -> Any:
    """The reference's graph with float16 weights and values, softmax and norms in float32 as the passes have it."""
    from compiler.passes.assign_precision import assign_precision
    from compiler.passes.pipelines import FUSION
    from compiler.passes.runner import run_passes

    return run_passes(plain.built.graph, (*FUSION, assign_precision("fp16")))[0]


def _bundle(path: Path, precision: str, out: Path) -> None:
    """As `compile`, whose random weights for a GPU would be made there, where nobody knows them."""
    from dataclasses import replace

    from compiler.api import compile_with, prepare

    prepared = prepare(path, size="tiny", weights="random", precision=precision, target=TARGET, toolchain=TOOLCHAIN)
    compile_with(replace(prepared, request=replace(prepared.request, out=out)), _weights(prepared))


def run(folder: Path, out: Path) -> None:
    """Build all engines, several at a time, then run each bundle; OUT is written after each."""
    from gpu import where

    bundles = sorted(path.parent for path in folder.glob("*/*/bundle.json") if path.parent.name in PRECISIONS)
    start = time.perf_counter()
    with ProcessPoolExecutor(8, get_context("spawn")) as pool:
        built = dict(zip(bundles, pool.map(_build, bundles), strict=True))
    result: dict[str, Any] = {**where(), "build seconds": round(time.perf_counter() - start, 1), "cases": {}}
    for bundle in bundles:
        key = f"{bundle.parent.name} {bundle.name}"
        try:
            result["cases"][key] = {"built": built[bundle], **(_one(bundle) if built[bundle] == "yes" else {})}
        except Exception as error:  # noqa: BLE001 (one family must not hide the others; the text goes into the table)
            result["cases"][key] = {"built": built[bundle], "failed": f"{type(error).__name__}: {error}"[:600]}
        print(key, result["cases"][key], flush=True)
        out.write_text(json.dumps(result, indent=1))


def _build(bundle: Path) -> str:
    from compiler.lower.tensorrt.plans import build_bundle

    try:
        build_bundle(bundle)
    except Exception as error:  # noqa: BLE001 (as above)
        return f"{type(error).__name__}: {error}"[:600]
    return "yes"


def _one(bundle: Path) -> dict[str, Any]:
    import runtime

    arrays = np.load(bundle.parent / "expected.npz")
    count = sum(name.startswith("p") for name in arrays)
    rows = [arrays[f"p{index}"].tolist() for index in range(count)]
    name = str(arrays["output"])
    with runtime.load(bundle) as model:
        found = [item[name] for item in model.forward(rows)]
        error = max(float(np.abs(found[i] - arrays[f"r{i}"]).max()) for i in range(count))
        theirs = max(float(np.abs(arrays[f"h{i}"] - arrays[f"r{i}"]).max()) for i in range(count))
        result: dict[str, Any] = {"output": name, "error": error, "float16 error of the reference": theirs}
        if "g0" in arrays:
            new = model.generate(rows, max_new_tokens=NEW, stop=())
            result["greedy equal"] = [new[i] == arrays[f"g{i}"].tolist() for i in range(count)]
    limit = FP32 if bundle.name == "fp32" else FACTOR * theirs
    result["within"] = error <= limit and (bundle.name != "fp32" or all(result.get("greedy equal", [True])))
    return result


def records(found: Path) -> None:
    """One record of `executed` for each case that is within its limit, beside the whole result."""
    from compiler.validate.records import digest
    from specs.precision import load_recipe

    result = json.loads(found.read_text())
    entries = []
    for key, case in result["cases"].items():
        model, precision = key.split()
        if not case.get("within"):
            continue
        text = f"{result['gpu']}: `{case['output']}` of the tiny size off by {case['error']:.2g} at most"
        text += (
            f" (the reference in float16: {case['float16 error of the reference']:.2g})" if precision == "fp16" else ""
        )
        text += ", greedy ids equal" if all(case.get("greedy equal", [False])) else ""
        entries.append(
            {
                "level": "executed", "model": model, "precision": precision, "gpu": f"sm{result['sm']}",
                "toolchain": TOOLCHAIN, "date": result["date"], "versions": f"TensorRT {result['tensorrt']}",
                "text": text, "spec": digest(ROOT / "specs" / "models" / f"{model}.yaml"),
                "recipe": digest(Path(load_recipe(precision).where.file)),
            }
        )  # fmt: skip
    path = ROOT / "docs" / "evidence" / "gpu" / "families-h200.json"
    path.write_text(json.dumps({**result, "records": entries}, indent=1) + "\n")
    print(f"{len(entries)} of {len(result['cases'])} cases are within their limits; wrote {path}")


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "make":
        make(Path(rest[0]), rest[1:])
    elif command == "run":
        run(Path(rest[0]), Path(rest[1]))
    else:
        records(Path(rest[0]))
