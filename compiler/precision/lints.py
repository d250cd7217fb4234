"""What works and may surprise, told when a model is compiled: groups that do not divide, ranges that float16 lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compiler.passes.quantization_plan import leaf_of
from compiler.precision.decide import Reason

if TYPE_CHECKING:
    from compiler.api import Prepared

_BRAIN = "bfloat16"


def lints(prepared: Prepared) -> tuple[Reason, ...]:
    """Warnings about a prepared model's precision: hazards of the chip, then what model and recipe make together."""
    return (*prepared.precision.decision.lints, *_groups(prepared), *_overflow(prepared), *_seldom(prepared))


def _groups(prepared: Prepared) -> tuple[Reason, ...]:
    """Linears whose inputs the recipe's first group does not divide."""
    plan = prepared.precision.plan
    told: dict[str, dict[str, int]] = {}
    for linear in () if plan is None else plan.linears.values():
        weights, block, width = linear.recipe.weights, linear.storage.block, linear.storage.shape[-1]
        if weights is None or weights.per not in ("group", "square") or block[-1:] == weights.group[:1]:
            continue
        shared = f"{block[-1]} share a scale" if block else "all of an output share one scale"
        sizes = " or ".join(map(str, weights.group if not block else weights.group[:1]))
        text = f"{width:,} inputs are no multiple of {sizes}: {shared}"
        leaves = told.setdefault(text, {})
        leaf = leaf_of(linear.weight)
        leaves[leaf] = leaves.get(leaf, 0) + 1
    return tuple(
        Reason("group", f"{', '.join(f'{leaf} x {count}' for leaf, count in leaves.items())}: {text}")
        for text, leaves in told.items()
    )


def _overflow(prepared: Prepared) -> tuple[Reason, ...]:
    """float16 for a model that was trained with the range of float32."""
    checkpoint, precision = prepared.source.checkpoint, prepared.precision
    if checkpoint is None or precision.base != "fp16":
        return ()
    stated = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    if stated != _BRAIN and not any(info.dtype == "BF16" for info in checkpoint.tensors.values()):
        return ()
    what = "weights" if prepared.request.target == "cpu" else "activations"
    other = "bf16 or fp32" if prepared.request.target == "cpu" or int(prepared.request.target[2:]) >= 80 else "fp32"
    text = f"trained in {_BRAIN}, which has the range of float32; float16 ends at 65,504: {what} may overflow"
    return (Reason("range", f"{text}; take {other}"),)


def _seldom(prepared: Prepared) -> tuple[Reason, ...]:
    """Experts that calibration saw too few tokens of; known once a model is compiled."""
    plan = prepared.precision.plan
    told = {} if plan is None else plan.seldom
    names = [f"{name.removesuffix('.weight')}[{', '.join(map(str, few))}]" for name, few in told.items()]
    text = "got fewer tokens in calibration than an eighth of their inputs: rounded to nearest"
    return (Reason("experts", f"{', '.join(names)} {text}"),) if names else ()
