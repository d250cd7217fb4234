"""The low-bit weights of a prepared model: what its plan says, with the calibration that its recipe needs."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.quantization.stored_codes import stored_codes
from compiler.quantization.weights import quantized_weights
from specs.errors import SpecRTError
from specs.precision import STORED

if TYPE_CHECKING:
    import torch

    from compiler.api import Prepared
    from compiler.passes.quantization_plan import QuantizationPlan

Weights = Callable[[str], "torch.Tensor"]
Progress = Callable[[str, int, int], None]


def low_bit_weights(prepared: Prepared, base: Weights, progress: Progress | None = None) -> Weights:
    """The weights of a prepared model's graph by name. Raises SpecRTError PREC-012 to PREC-014 for the calibration."""
    plan = prepared.precision.plan
    if plan is None or not plan.linears:
        return base
    needing, stored = prepared.precision.needing_data(), prepared.precision.stored
    own = {name: linear for name, linear in plan.linears.items() if linear.recipe.name == STORED}
    rounded = {name: linear for name, linear in plan.linears.items() if name not in own}
    plan = replace(plan, linears=rounded)
    made = _calibrated(prepared, base, needing, plan, progress) if needing else None
    weights = quantized_weights(base, rounded, made)
    return stored_codes(weights, own, stored.sources if stored else {})


def _calibrated(
    prepared: Prepared, base: Weights, needing: str, plan: QuantizationPlan, progress: Progress | None
) -> Weights:
    import numpy as np

    from compiler.passes import pipelines
    from compiler.passes.runner import run_passes
    from compiler.quantization.calibrate import calibrate
    from compiler.quantization.tokens import digest, windows
    from compiler.validate.expect import marked, rules_of

    asked = prepared.request
    if asked.calibration is None:
        raise SpecRTError(
            "PREC-012", f"{needing} looks at data, and no calibration file is given",
            hint="`--calibration FILE`: token ids (.npy) or text; the demo has calibration-tokens.npy",
        )  # fmt: skip
    counts = [linear.recipe.calibration for linear in plan.linears.values() if linear.recipe.calibration is not None]
    length = min(max(count.length for count in counts), prepared.limits.sequence)
    vocab, folder = prepared.source.config.get("vocab"), prepared.source.checkpoint
    tokenizer = None if folder is None else Path(folder.dir) / "tokenizer.json"
    tokens = windows(asked.calibration, max(count.windows for count in counts), length, vocab, tokenizer, asked.seed)
    tokens = np.array([marked(row, prepared) for row in tokens.tolist()])
    graph, _ = run_passes(prepared.built.graph, pipelines.FUSION)
    told = f"{graph}{plan.recipe.model_dump()}{plan.linears}{digest(tokens)}{_identity(prepared)}"
    return calibrate(graph, plan, base, tokens, _folder(prepared, told), progress, rules_of(prepared))


def _identity(prepared: Prepared) -> str:
    """What tells these weights from others: their files as they are now, or how they are made."""
    asked, checkpoint = prepared.request, prepared.source.checkpoint
    if checkpoint is None or asked.weights == "random":
        return f"random {asked.seed}"
    files = sorted({Path(tensor.file) for tensor in checkpoint.tensors.values()})
    return " ".join(f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)


def _folder(prepared: Prepared, told: str) -> Path:
    """Where results lie until the bundle is written: beside it, so that an interrupted compile goes on from them."""
    from compiler.api import default_out

    out = prepared.request.out or default_out(prepared)
    return out.parent / f".{out.name}.calibration" / hashlib.sha256(told.encode()).hexdigest()[:16]


def forget_calibration(out: Path) -> None:
    """Remove the results of a calibration whose bundle is written."""
    shutil.rmtree(out.parent / f".{out.name}.calibration", ignore_errors=True)
