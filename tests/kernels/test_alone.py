"""Models without any engine, in a precision that the toolchain has none for or because nothing else is wanted."""

from __future__ import annotations

from pathlib import Path

import pytest

from compiler.lower.low_bit import KernelSteps
from compiler.lower.tensorrt.cut import cut
from specs.errors import SpecRTError
from specs.precision import load_recipe
from tests.golden_errors import ROOT, check_raises
from tests.kernels.test_low_bit import INPUTS_TOO, WEIGHTS_ONLY, check, pieces_of
from tests.tensorrt.models import SPECS, tiny

ALONE = KernelSteps("tensorrt-8.6", 90, alone=True)
MODELS = ROOT / "specs" / "models"
# Programs in float16 are within 0.0009 of the norm here. Of a number bfloat16 keeps 2^-8 where float16 keeps 2^-11:
# eight times as much, and half as much again for what these few models do not show.
BF16 = 1.2e-2
# What kernels lack of the other specs.
LACKING = {
    "bert": "`attention` has no rule for rows",
    "roberta": "`attention` has no rule for rows",
    "chatglm": "`compare` has no rule for rows",
    "deepseek_v2": "%ones.bf16 has no rows",
    "deepseek_v3": "%ones.bf16 has no rows",
}


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_each_family(path: Path) -> None:
    """Every segment is a program, at every number of rows; or the first that can't be is refused."""
    graph = tiny(path, "bf16").graph
    if path.stem not in LACKING:
        assert {step.kind for step in cut(graph, kernels=ALONE).steps} <= {"program", "kernel"}
        return
    with pytest.raises(SpecRTError) as caught:
        cut(graph, kernels=ALONE)
    assert caught.value.code == "LOWER-039"
    assert LACKING[path.stem] in caught.value.message


@pytest.mark.parametrize(
    ("name", "precision"), [("llama", "bf16"), ("bloom", "bf16"), ("gpt_oss", "bf16"), ("gemma3", "fp16")]
)
def test_what_programs_compute(name: str, precision: str) -> None:
    model = tiny(MODELS / f"{name}.yaml", precision)
    pieces = cut(model.graph, kernels=ALONE)
    weights = {key: tensor.make(model.weights) for key, tensor in pieces.tensors.items()}
    bound = BF16 if precision == "bf16" else WEIGHTS_ONLY
    assert check(pieces, weights, bound) == [step.kind for step in pieces.steps].count("program")


@pytest.mark.parametrize(("recipe", "bound"), [("w4a16", BF16), ("w8a8_sq_static", INPUTS_TOO)])
def test_codes_beside_bfloat16(recipe: str, bound: float) -> None:
    """Also of a recipe that engines have products for."""
    asked = load_recipe(recipe).model_copy(update={"base": ("bf16",)})
    pieces, weights, _ = pieces_of("llama", asked, precision="bf16", kernels=ALONE)
    assert check(pieces, weights, bound) == 4


def test_a_precision_that_kernels_do_not_multiply() -> None:
    check_raises("LOWER-039-alone", cut, tiny(MODELS / "llama.yaml", "fp32").graph, kernels=ALONE)
