"""Write docs/evidence/emitted.json: which model, precision and TensorRT line the contract test holds for.

    python tools/emitted_evidence.py [JOBS]

Each case is the check of tests/tensorrt/test_contract.py, or of test_quantized.py where a toolchain's file calls the
products of a precision native, run here for all of them: the network of the model's tiny size, emitted for the recorded
interface of that version and computed layer by layer, against the interpreter.
"""

from __future__ import annotations

import datetime
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

OUT = ROOT / "docs" / "evidence" / "emitted.json"
PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
TEXT = {
    True: "every segment emitted, accepted and computed layer by layer",
    False: "every segment with its products of codes emitted, accepted and computed layer by layer, the same codes",
}
# the recorded version that stands for a line of specs/toolchains
LINES = {
    "8.6.0": "tensorrt-8.6", "10.0.1": "tensorrt-10.0", "10.8.0": "tensorrt-10.8", "10.16.1": "tensorrt-10.16",
    "11.4.0": "tensorrt-11.4",
}  # fmt: skip


def native(line: str) -> tuple[tuple[str, str], ...]:
    """The precisions whose products a toolchain calls native, each with its bases (tests/tensorrt/low_bit.py)."""
    found: tuple[tuple[str, str], ...] = import_module("tests.tensorrt.low_bit").native(line)
    return found


def holds(case: tuple[str, str, str]) -> str:
    """Nothing, or why the contract does not hold for (spec, precision, version)."""
    import torch

    torch.set_num_threads(1)
    spec, precision, version = case
    path = ROOT / "specs" / "models" / f"{spec}.yaml"
    try:
        if precision in PRECISIONS:
            import_module("tests.tensorrt.test_contract").test_emitted(path, precision, version)
        else:
            quantized = import_module("tests.tensorrt.test_quantized")
            for base in ("fp32", *(base for name, base in native(LINES[version]) if name == precision)):
                quantized.test_emitted(path, precision, base, version)
    except Exception as error:  # noqa: BLE001 (what does not hold is told, whatever it is)
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def main() -> int:
    """Run all cases and write those that hold; exit 1 if one does not."""
    from compiler.precision import decide
    from compiler.validate.records import digest
    from specs.hardware import gpu_names, load_gpu, load_toolchain
    from specs.precision import load_recipe

    recorder = import_module("tests.tensorrt.recorder")
    versions = {version: LINES[version] for version in recorder.VERSIONS if version in LINES}
    if set(versions) != set(LINES):
        raise SystemExit(
            f"recorded versions are {', '.join(recorder.VERSIONS)}, expected {', '.join(LINES)} among them"
        )

    def possible(precision: str, line: str) -> bool:
        toolchain, gpus = load_toolchain(line), map(load_gpu, gpu_names())
        decisions = [decide(load_recipe(precision), toolchain, gpu) for gpu in gpus]
        return any(decision.works and not decision.alone for decision in decisions)  # alone: no network, only kernels

    cases = [
        (path.stem, precision, version)
        for path in sorted((ROOT / "specs" / "models").glob("*.yaml"))
        for version, line in versions.items()
        for precision in (*PRECISIONS, *dict.fromkeys(name for name, _ in native(line)))
        if possible(precision, line)
    ]
    jobs = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        found = dict(zip(cases, pool.map(holds, cases, chunksize=4), strict=True))
    date = datetime.date.today().isoformat()
    records = [
        {
            "level": "emitted", "model": spec, "precision": precision, "gpu": "any", "toolchain": versions[version],
            "date": date, "versions": f"recorded interface of TensorRT {version}",
            "text": TEXT[precision in PRECISIONS], "recipe":
            digest(Path(load_recipe(precision).where.file)), "spec": digest(ROOT / "specs" / "models" / f"{spec}.yaml"),
        }
        for (spec, precision, version), why in found.items()
        if not why
    ]  # fmt: skip
    OUT.write_text(json.dumps({"records": records}, indent=0) + "\n", encoding="utf-8")
    missing = {case: why for case, why in found.items() if why}
    for case, why in missing.items():
        print(*case, why)
    print(f"{len(records)} of {len(cases)} cases hold; wrote {OUT}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
