"""Every operation as emitted for every version, against the interpreter: the cases that the CPU backend is run on."""

from __future__ import annotations

import pytest
import torch

from compiler import prepare
from compiler.ir.core import Graph, walk
from compiler.ir.interpreter import run
from compiler.ir.ops import REGISTRY
from compiler.lower import Decompose, Emit, Unsupported
from compiler.lower.tensorrt.capabilities import table, verdict
from compiler.lower.tensorrt.cut import cut
from compiler.lower.tensorrt.dialects import DIALECTS, TOOLCHAINS, Dialect, dialect
from compiler.passes.pipelines import FUSION, NATIVE
from compiler.passes.runner import run_passes
from tests.conformance.cases import Case
from tests.conformance.test_operations import PAIRS, feed, typed
from tests.conformance.tolerances import tolerance
from tests.golden_errors import ROOT, check_raises
from tests.lower.test_capability import admissible
from tests.tensorrt import recorder
from tests.tensorrt.driver import baked, recorded, run_plan


def test_every_operation_and_type_has_one_verdict() -> None:
    for version in DIALECTS:
        rows = table(version)
        assert set(rows) == set(REGISTRY)
        for name, row in rows.items():
            assert set(row) == admissible(name), name


def test_verdicts_have_reasons() -> None:
    for version in DIALECTS:
        for name, row in table(version).items():
            for dtype, found in row.items():
                if not isinstance(found, Emit):
                    assert found.rule if isinstance(found, Decompose) else found.reason, (name, dtype)


def test_versions_between_and_after_the_recorded_ones_find_their_line() -> None:
    assert dialect("8.6.0").toolchain == "tensorrt-8.6"
    assert dialect("10.2.0.19") == dialect("tensorrt-10.0")
    assert dialect("10.16.1.11").version == "10.16"
    assert dialect("12.0").version == "11.4"
    assert [dialect(name).toolchain for name in TOOLCHAINS] == list(TOOLCHAINS)


@pytest.mark.parametrize("version", ["8.5.3", "newest"])
def test_versions_before_the_first_are_refused(version: str) -> None:
    check_raises("LOWER-030" if version == "8.5.3" else "LOWER-030-text", dialect, version)


def test_a_bias_in_bfloat16_is_the_kernels_and_no_engines() -> None:
    made = prepare(ROOT / "specs" / "models" / "falcon.yaml", size="rw-1b")
    paged = next(equation for equation in walk(made.graph.equations) if equation.op == "paged_attention")
    assert paged.attr["bf16_bias"] is not None
    plain = run_passes(made.built.graph, FUSION)[0]
    native = run_passes(plain, NATIVE)[0]
    inside = [
        next(equation for equation in walk(graph.equations) if equation.op == op)
        for graph, op in ((plain, "attention"), (native, "cached_attention"))
    ]
    for version in DIALECTS:
        assert isinstance(verdict(paged, version), Emit)
        assert all(isinstance(verdict(equation, version), Unsupported) for equation in inside)


VERSIONS = ("8.6.0", "10.0.1", "10.8.0", "11.4.0")


def supported(graph: Graph, version: Dialect) -> bool:
    return not any(isinstance(verdict(equation, version), Unsupported) for equation in walk(graph.equations))


@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=[f"{case.name}-{dtype}" for case, dtype in PAIRS])
def test_operation(case: Case, dtype: str) -> None:
    graph = typed(case, dtype)
    assert graph is not None
    versions = [version for version in VERSIONS if supported(graph, dialect(version))]
    if not versions or case.op == "paged_attention":
        return
    inputs, weights = feed(graph, case)
    for name in {"s", "o"} & set(weights):  # TensorRT wants positive scales
        weights[name] = weights[name].float().abs().to(weights[name].dtype)
    given = {name: tensor.clone() for name, tensor in inputs.items()}  # a cache is changed in place
    expected = run(graph, given, weights.__getitem__)["y"]
    holds = any(equation.op == "dequantize" and "block" in equation.attr for equation in walk(graph.equations))
    pieces = cut(graph, baked=holds)
    stored = {name: tensor.make(weights.__getitem__) for name, tensor in pieces.tensors.items()}
    for version in versions:
        engine = recorded(recorder.module(version), dialect(version), baked(pieces, stored))
        given = {name: tensor.clone() for name, tensor in inputs.items()}
        got = run_plan(pieces, given, stored, {}, engine)["y"]
        check(case, dtype, got, expected, inputs)


def check(case: Case, dtype: str, got: torch.Tensor, expected: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    bound = tolerance(case.op, got_type(case, dtype, expected))
    if case.op == "dequantize":  # sums of any size: what a bound says of size 1 holds of theirs
        size = float(expected.abs().max())
        got, expected = got / size, expected / size
    if "positions" in inputs:  # what padding computes is nobody's business, but it must be finite
        assert torch.isfinite(got.float()).all()
        got, expected = got[inputs["positions"] >= 0], expected[inputs["positions"] >= 0]
    difference = (got.double() - expected.double()).abs()
    excess = difference - bound.absolute - bound.relative * expected.double().abs()
    assert excess.max() <= 0, f"off by {difference.max():.3g}, tolerance {bound}"


def got_type(case: Case, dtype: str, expected: torch.Tensor) -> str:
    """The type that decides the tolerance: of the result where that is rounded to, elsewhere of the operands."""
    from compiler.ir.interpreter import ir_dtype

    of_result = case.op in ("cast", "dequantize", "quantize", "row_scale")
    return ir_dtype(expected.dtype) if of_result else dtype


def test_most_operations_were_run() -> None:
    run_in = {
        version: {
            case.op
            for case, dtype in PAIRS
            if (graph := typed(case, dtype)) is not None and supported(graph, dialect(version))
        }
        for version in VERSIONS
    }
    nowhere = {"state", "paged_attention", "all_reduce", "all_gather"}  # kernels and exchanges
    for version, ops in run_in.items():
        without = nowhere if dialect(version).attention else nowhere | {"update_cache", "cached_attention"}
        assert ops >= set(REGISTRY) - without
