"""Every family's tiny model on a real GPU: its logits and greedy ids against the reference in float32.

    python bench/gpu_families.py make FOLDER PRECISION,... [SPEC ...]   here: bundles for sm90, and what to compare with
                                                                        `fp16+int8`: fp16 with a KV cache in int8
    python bench/gpu_families.py run FOLDER OUT.json [PRECISION,...]    where the GPU is, in that order; no PyTorch
    python bench/gpu_families.py records OUT.json                       here: as evidence, into docs/evidence/gpu

The reference is the interpreter on the plain equations; in 16 bits its own error is the measure (a factor of at most 2
is asked for), with low-bit weights the recipe's bound. Greedy ids are those of the CPU engine in float32, which
tests/families holds to the original's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TARGET, TOOLCHAIN = "sm90", "tensorrt-8.6"
NEW = 16
WORKERS, BUILDERS = 12, 1  # processes; a builder times its tactics, and beside others each of them waits for its turn
CACHE = 2048  # tokens of cache in each model: several share the device
OWN = "error of the reference in its type"
HALVES = {"fp16": "h", "bf16": "b"}  # where expected.npz has what the reference makes of them
FACTOR = 2.0  # times the reference's own error in the same type
COLUMNS = ("fp32", "fp16", "bf16", "fp8", "w8a8_sq", "w4a16_awq", "w8a16", "w4a16_gptq", "w4a16")
HEAD = """Written by `bench/gpu_families.py records`; do not edit. Random weights; the reference is the interpreter in
float32 on the plain equations. fp32: the greatest error of an output (at most 1e-3; greedy ids equal in all). fp16 and
bf16: the same, and how many times the reference's own error in that type it is (at most 2). Low-bit: mean KL divergence
of the logits (encoders: the error of the output, of its size) against the recipe's bound. **Bold** is beyond the bound;
empty was not run."""
FP32 = 1e-3  # greatest absolute error of a float32 engine's output


def make(folder: Path, precisions: list[str], names: list[str]) -> None:
    """A bundle for each spec and precision with its random weights inside, and expected.npz."""
    import compiler
    import runtime
    from compiler.api import float_weights
    from compiler.validate.emulate import random_ids
    from compiler.validate.expect import expect
    from specs.errors import SpecRTError

    refused: dict[str, str] = {}
    for path in sorted((ROOT / "specs" / "models").glob("*.yaml")):
        if names and path.stem not in names:
            continue
        home = folder / path.stem
        home.mkdir(parents=True, exist_ok=True)
        plain = compiler.prepare(path, size="tiny", weights="random", precision="fp32")
        weights = float_weights(plain)
        expected = expect(plain, weights)
        arrays: dict[str, Any] = {"output": np.array(expected.name)}
        for index, (row, found) in enumerate(zip(expected.rows, expected.judged, strict=True)):
            arrays |= {f"p{index}": np.array(row, np.int32), f"r{index}": found}
        for precision, letter in HALVES.items():
            halves = expect(plain, weights, expected.rows, graph=_in_halves(plain, precision)).judged
            arrays |= {f"{letter}{index}": half for index, half in enumerate(halves)}
        if plain.role == "decoder":
            with runtime.load(compiler.compile(path, size="tiny", weights="random", out=home / "cpu")) as model:
                for index, ids in enumerate(model.generate(expected.rows, max_new_tokens=NEW, stop=())):
                    arrays[f"g{index}"] = np.array(ids, np.int32)
        np.savez_compressed(home / "expected.npz", **arrays)
        calibration = random_ids(plain, home, seed=0)
        for precision in precisions:
            try:
                _bundle(path, precision, home / precision, calibration)
            except SpecRTError as error:
                refused[f"{path.stem} {precision}"] = str(error)
                print(f"{path.stem} {precision}: {error}", flush=True)
    (folder / "refused.json").write_text(json.dumps(refused, indent=1))


def _in_halves(plain: Any, precision: str) -> Any:
    """The reference's graph with 16-bit weights and values, softmax and norms in float32 as the passes have it."""
    from compiler.passes.assign_precision import assign_precision
    from compiler.passes.pipelines import FUSION
    from compiler.passes.runner import run_passes

    return run_passes(plain.built.graph, (*FUSION, assign_precision(precision)))[0]


def _bundle(path: Path, precision: str, out: Path, calibration: Path) -> None:
    """As `compile`, whose random weights for a GPU would be made there, where nobody knows them."""
    from compiler.api import compile_with, prepare, weights_of

    recipe, _, cache = precision.partition("+")
    prepared = prepare(
        path, size="tiny", weights="random", precision=recipe, kv_cache=cache or None, target=TARGET,
        toolchain=TOOLCHAIN, out=out, calibration=calibration,
    )  # fmt: skip
    compile_with(prepared, weights_of(prepared))


def run(folder: Path, out: Path, precisions: Sequence[str]) -> None:
    """Build and run each bundle, several beside each other; OUT is written after each, so that a limit loses little.

    Those without engines come first; the others are left out where no TensorRT is.
    """
    from gpu import where

    found = sorted(path.parent for path in folder.glob("*/*/bundle.json") if path.parent.name != "cpu")
    order = precisions or sorted({bundle.name for bundle in found})
    bundles = [bundle for precision in order for bundle in found if bundle.name == precision]
    result: dict[str, Any] = {**where(), "cases": {}}
    start = time.perf_counter()
    for workers, engines in ((WORKERS, False), (BUILDERS, True)):
        chosen = [bundle for bundle in bundles if _has_engines(bundle) == engines]
        if engines and not result["tensorrt"]:
            print(f"{len(chosen)} bundles have engines and were left out: no TensorRT here")
            break
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            asked = {pool.submit(_case, bundle): f"{bundle.parent.name} {bundle.name}" for bundle in chosen}
            for done in as_completed(asked):
                result["cases"][asked[done]] = done.result()
                result["seconds"] = round(time.perf_counter() - start, 1)
                print(asked[done], done.result(), flush=True)
                out.write_text(json.dumps(result, indent=1))


def _has_engines(bundle: Path) -> bool:
    steps = json.loads((bundle / "plan.json").read_text())["steps"]
    return any(step["backend"] == "tensorrt" for step in steps)


def _case(bundle: Path) -> dict[str, Any]:
    """What was found of one bundle; what went wrong with it is text in the table, and hides no other."""
    from compiler.lower.tensorrt.plans import build_bundle

    try:
        build_bundle(bundle)
    except Exception as error:  # noqa: BLE001 (see above)
        return {"built": f"{type(error).__name__}: {error}"[:600]}
    try:
        return {"built": "yes", "engines": _has_engines(bundle), **_one(bundle)}
    except Exception as error:  # noqa: BLE001 (see above)
        return {"built": "yes", "failed": f"{type(error).__name__}: {error}"[:600]}


def _one(bundle: Path) -> dict[str, Any]:
    import runtime

    arrays = np.load(bundle.parent / "expected.npz")
    count = sum(name.startswith("p") for name in arrays)
    rows = [arrays[f"p{index}"].tolist() for index in range(count)]
    name = str(arrays["output"])
    with runtime.load(bundle, cache_tokens=CACHE) as model:
        found = [item[name] for item in model.forward(rows)]
        new = model.generate(rows, max_new_tokens=NEW, stop=()) if "g0" in arrays else []
    wanted = [arrays[f"r{index}"] for index in range(count)]
    result: dict[str, Any] = {"output": name}
    if letter := HALVES.get(bundle.name):
        result[OWN] = max(float(np.abs(arrays[f"{letter}{i}"] - wanted[i]).max()) for i in range(count))
    result["error"] = max(float(np.abs(found[i] - wanted[i]).max()) for i in range(count))
    result |= {"greedy equal": [new[i] == arrays[f"g{i}"].tolist() for i in range(count)]} if new else {}
    return {**result, **_judged(bundle.name, result, found, wanted)}


def _judged(precision: str, result: Mapping[str, Any], found: Sequence[Any], wanted: Sequence[Any]) -> dict[str, Any]:
    """Whether a model is within its precision's limit, and what was measured against it."""
    from compiler.validate.metrics import agreement
    from specs.precision import load_recipe, with_cache

    name, _, cache = precision.partition("+")
    recipe = with_cache(load_recipe(name), cache or None)
    if precision in HALVES:
        limit = FACTOR * result[OWN]
        return {"limit": limit, "within": result["error"] <= limit}
    if precision == "fp32":
        return {"limit": FP32, "within": result["error"] <= FP32 and all(result.get("greedy equal", [True]))}
    numbers = agreement([np.atleast_2d(x) for x in found], [np.atleast_2d(x) for x in wanted])
    kind = "mean_kl" if result["output"] == "logits" else "relative"  # as the report judges
    limit, got = getattr(recipe.bound, kind), getattr(numbers, kind)
    return {kind: got, "relative": numbers.relative, "limit": limit, "within": bool(got <= limit)}


def records(found: Path) -> None:
    """One record of `executed` for each case within its limit; what was run before and not this time stays."""
    from compiler.validate.records import digest
    from specs.precision import load_recipe

    result = json.loads(found.read_text())
    # none is needed for plans that have no engine
    version = f"TensorRT {result['tensorrt']}" if result["tensorrt"] else "no TensorRT"
    entries = []
    for key, case in result["cases"].items():
        model, precision = key.split()
        if not case.get("within") or "+" in precision:  # the matrix of records has no caches
            continue
        text = f"{result['gpu']}: `{case['output']}` of the tiny size off by {case['error']:.2g} at most"
        if precision in HALVES:
            text += f" (the reference in {precision}: {case[OWN]:.2g})"
        elif "relative" in case:
            text += f", {case['relative']:.2g} of its size"
            text += f", mean KL {case['mean_kl']:.2g}" if "mean_kl" in case else ""
        text += "" if case.get("engines", True) else ", kernels alone"
        text += ", greedy ids equal" if all(case.get("greedy equal", [False])) else ""
        entries.append(
            {
                "level": "executed", "model": model, "precision": precision, "gpu": f"sm{result['sm']}",
                "toolchain": TOOLCHAIN, "date": result["date"], "versions": version,
                "text": text, "spec": digest(ROOT / "specs" / "models" / f"{model}.yaml"),
                "recipe": digest(Path(load_recipe(precision).where.file)),
            }
        )  # fmt: skip
    path = ROOT / "docs" / "evidence" / "gpu" / "families-h200.json"
    before = json.loads(path.read_text()) if path.is_file() else {"cases": {}, "records": []}
    cases = {key: case for key, case in before["cases"].items() if key not in result["cases"]}
    kept = [entry for entry in before["records"] if f"{entry['model']} {entry['precision']}" in cases]
    document = {**result, "cases": {**cases, **result["cases"]}, "records": [*kept, *entries]}
    path.write_text(json.dumps(document, indent=1) + "\n")
    (ROOT / "docs" / "evidence" / "families.md").write_text(table(document))
    print(f"{len(entries)} of {len(result['cases'])} cases are within their limits; wrote {path}")


def table(document: Mapping[str, Any]) -> str:
    """All cases as a page: a row for each spec."""
    cases: Mapping[str, Mapping[str, Any]] = document["cases"]
    precisions = [name for name in COLUMNS if any(key.endswith(f" {name}") for key in cases)]
    lines = [
        f"# Every spec's tiny model on one {document['gpu']}", "", HEAD, "",
        f"| spec | {' | '.join(precisions)} |", "|---" * (len(precisions) + 1) + "|",
    ]  # fmt: skip
    for spec in sorted({key.split()[0] for key in cases}):
        found = [_cell(name, cases.get(f"{spec} {name}")) for name in precisions]
        lines.append(f"| {spec} | {' | '.join(found)} |")
    others = sorted(key.split()[::-1] for key in cases if key.split()[1] not in COLUMNS)
    if others:
        lines += [
            "",
            "Other precisions; `+` is the type of the KV cache:",
            "",
            "| precision | spec | | bound |",
            "|---|---|---|---|",
        ]
    for precision, spec in others:
        case = cases[f"{spec} {precision}"]
        lines.append(f"| {precision} | {spec} | {_cell(precision, case)} | {case.get('limit', 0):.2g} |")
    return "\n".join(lines) + "\n"


def _cell(precision: str, case: Mapping[str, Any] | None) -> str:
    if case is None:
        return ""
    if "within" not in case:
        return "failed"
    if precision == "fp32":
        text = f"{case['error']:.1e}"
    elif precision in HALVES:
        text = f"{case['error']:.1e} = {case['error'] / case[OWN]:.2f}x"
    else:
        kind = "mean_kl" if "mean_kl" in case else "relative"
        text = f"{case[kind]:.4f}" + ("" if kind == "mean_kl" else " of its size")
    return text if case["within"] else f"**{text}**"


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "make":
        make(Path(rest[0]), rest[1].split(","), rest[2:])
    elif command == "run":
        run(Path(rest[0]), Path(rest[1]), rest[2].split(",") if rest[2:] else ())
    else:
        records(Path(rest[0]))
