"""Every operation and element type that the CPU backend says it computes: OpenVINO against the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from compiler.ir.core import Graph, walk
from compiler.ir.formats import RANGE, round_to
from compiler.ir.interpreter import run, torch_dtype
from compiler.ir.names import expand
from compiler.ir.ops import REGISTRY
from compiler.ir.parser import parse
from compiler.ir.types import DTYPES, TensorType
from compiler.ir.verify import verify
from compiler.lower import Unsupported
from compiler.lower.openvino import verdict
from compiler.lower.openvino.capabilities import TABLE
from specs.errors import SpecRTError
from tests.conformance.cases import CASES, Case
from tests.conformance.tolerances import tolerance
from tests.lower.engine import lowered

GAPS: dict[str, str] = yaml.safe_load((Path(__file__).parent / "gaps.yaml").read_text())
SIZES = {"B": 3, "S": 5}


def random_tensor(kind: TensorType, bounds: tuple[float, float] | None, generator: torch.Generator) -> torch.Tensor:
    shape = [SIZES[size] if isinstance(size, str) else size for size in kind.shape]
    dtype = torch_dtype(kind.dtype)
    if kind.dtype == "bool":
        return torch.rand(shape, generator=generator) < 0.5
    if kind.dtype in RANGE and kind.dtype != "i8" and kind.dtype != "u8":  # every value of the format
        low, high = RANGE[kind.dtype]
        return round_to(torch.rand(shape, generator=generator) * (high - low) + low, kind.dtype)
    if kind.dtype == "f8e8m0":
        return torch.exp2(torch.randint(-4, 3, shape, generator=generator).float()).to(dtype)
    if dtype.is_floating_point:
        low, high = bounds or (-2.0, 2.0)
        return (torch.rand(shape, generator=generator) * (high - low) + low).to(dtype)
    # 32-bit integers beyond what a float32 holds: sums of two fit, and nothing may go through a float
    wide = {"i32": (-(2.0**30), 2.0**30), "i8": (-60.0, 60.0), "u8": (0.0, 120.0)}
    low, high = bounds or wide.get(kind.dtype, (-9.0, 9.0))
    return torch.randint(int(low), int(high) + 1, shape, generator=generator, dtype=dtype)


def feed(graph: Graph, case: Case) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs and weights of a case: random, always the same."""
    generator = torch.Generator().manual_seed(7)
    inputs = {value.name: random_tensor(value.type, case.ranges.get(value.name), generator) for value in graph.inputs}
    if "positions" in inputs:
        inputs["positions"] = torch.arange(SIZES["S"], dtype=torch.int32).repeat(SIZES["B"], 1)
        inputs["positions"][1, 3:] = -1
    if case.op == "cached_attention":  # the place that is never written
        for name in ("k", "v"):
            inputs[name][:, :, -1] = 0
    weights = {
        expand(str(equation.attr["name"]), index): random_tensor(equation.result.type, None, generator)
        for equation in walk(graph.equations)
        if equation.op == "weight"
        for index in range(3)
    }
    return inputs, weights


def typed(case: Case, dtype: str) -> Graph | None:
    """The case in an element type, or None where the type rules refuse it."""
    try:
        graph = parse(case.text(dtype))
        verify(graph)
    except SpecRTError as error:
        if error.code != "IR-003":
            raise
        return None
    return graph


def pairs() -> list[tuple[Case, str]]:
    return [(case, dtype) for case in CASES for dtype in DTYPES if typed(case, dtype) is not None]


def supported(graph: Graph) -> bool:
    return not any(isinstance(verdict(equation), Unsupported) for equation in walk(graph.equations))


PAIRS = pairs()


def check(case: Case, dtype: str, folder: Path) -> None:
    graph = typed(case, dtype)
    assert graph is not None
    inputs, weights = feed(graph, case)
    expected = run(graph, inputs, weights.__getitem__)["y"]
    engine, _ = lowered(graph, weights.__getitem__, folder, "bf16" if dtype == "bf16" else "fp32")
    got = engine(inputs)["y"]
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    # what a cast rounds to decides, elsewhere the result has the type of the operands
    of_result = case.op in ("cast", "dequantize", "quantize", "row_scale")
    bound = tolerance(case.op, graph.outputs[0][1].type.dtype if of_result else dtype)
    if case.op == "dequantize":  # sums of any size: what a bound says of size 1 holds of theirs
        size = float(expected.abs().max())
        got, expected = got / size, expected / size
    if "positions" in inputs:  # what padding computes is nobody's business, but it must be finite
        assert torch.isfinite(got.float()).all()
        real = inputs["positions"] >= 0
        got, expected = got[real], expected[real]
    difference = (got.double() - expected.double()).abs()
    excess = difference - bound.absolute - bound.relative * expected.double().abs()
    assert excess.max() <= 0, f"off by {difference.max():.3g}, tolerance {bound}"


@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=[f"{case.name}-{dtype}" for case, dtype in PAIRS])
def test_operation(case: Case, dtype: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    graph = typed(case, dtype)
    assert graph is not None
    if not supported(graph):
        with pytest.raises(SpecRTError) as caught:
            lowered(graph, {}.__getitem__, tmp_path)
        assert caught.value.code == "LOWER-001"
        return
    if (reason := GAPS.get(f"{case.name}/{dtype}")) is not None:
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    check(case, dtype, tmp_path)


def test_gaps_name_pairs_that_exist() -> None:
    assert set(GAPS) <= {f"{case.name}/{dtype}" for case, dtype in PAIRS}


def test_every_operation_has_a_case() -> None:
    """`state` and `paged_attention` have their own suite; each supported pair of the table is run by a case."""
    run_here = {(case.op, dtype) for case, dtype in PAIRS}
    for op in set(REGISTRY) - {"state", "paged_attention"}:
        for dtype, found in TABLE[op].items():
            if not isinstance(found, Unsupported):
                assert (op, dtype) in run_here, f"no case runs `{op}` of {dtype}"
