"""Attention with a paged cache: every combination of features, in calls that mix prefill and decode."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch

from compiler.ir.cache_rows import HEAD
from compiler.ir.core import Graph, walk
from compiler.ir.interpreter import run, torch_dtype
from compiler.ir.parser import parse
from compiler.ir.verify import verify
from compiler.lower import Decompose, Emit, Unsupported
from compiler.lower.openvino import capabilities, verdict
from compiler.lower.openvino.capabilities import PAGED_NATIVE
from tests.conformance.grid import on_grid
from tests.conformance.tolerances import tolerance
from tests.lower.engine import lowered

# Each call: new tokens of each sequence by number. Chunked prefill, decode, and both at once; sequences join and leave.
CALLS: tuple[dict[int, int], ...] = ({0: 40}, {0: 1, 1: 37}, {2: 5, 0: 3, 1: 1}, {2: 30}, {0: 1, 2: 1})
BLOCKS = {0: [7, 2], 1: [5, 0], 2: [3, 6]}
FEATURES = ("window", "softcap", "slopes", "prefix", "sinks")
ATTRIBUTES = {"window": "window = 9", "softcap": "softcap = 2.0", "bf16_bias": "bf16_bias = 0.3"}


def graph(
    features: tuple[str, ...], dtype: str, heads: int = 4, groups: int = 2, dim: int = 32, wide: int = 0,
    codes: str | None = None,
) -> Graph:  # fmt: skip
    wide = wide or dim
    kind, head = (dtype, 0) if codes is None else ("u8", HEAD)
    attrs = [f"scale = {dim**-0.5}", "causal = true", *(ATTRIBUTES[name] for name in features if name in ATTRIBUTES)]
    if codes is not None:
        attrs.append(f"codes = {codes!r}".replace("'", '"'))
    if "slopes" in features:
        attrs.append(f"slopes = ({', '.join(str(2.0 ** (-0.25 * head - 1)) for head in range(heads))})")
    inputs = [f"%q: {dtype}[T,{heads},{dim}]", f"%k: {dtype}[T,{groups},{dim}]", f"%v: {dtype}[T,{groups},{wide}]"]
    inputs += ["%past_lens: i32[B]", "%seq_begins: i32[Z]", "%block_ids: i32[P]", "%block_begins: i32[Z]"]
    inputs += ["%max_context: i32[]"]
    operands = "%q, %k, %v, %kc, %vc, %past_lens, %seq_begins, %block_ids, %block_begins, %max_context"
    if "prefix" in features or "sinks" in features:
        operands += ", %prefix" if "prefix" in features else ", _"
        inputs += ["%prefix: i32[B]"] if "prefix" in features else []
    if "sinks" in features:
        operands += ", %sinks"
        inputs.append(f"%sinks: {dtype}[{heads}]")
    text = f"""graph paged({", ".join(inputs)}) {{
      dim T in 1..8..64 dim B in 1..2..8 dim Z in 2..3..9 dim P in 1..4..16 dim C in 1..8..16
      %kc: {kind}[C,{groups},32,{dim + head}] = state() {{name = "cache.k"}}
      %vc: {kind}[C,{groups},32,{wide + head}] = state() {{name = "cache.v"}}
      %y: {dtype}[T,{heads},{wide}] = paged_attention({operands}) {{{", ".join(attrs)}}}
      return y = %y }}"""
    made = parse(text)
    verify(made)
    return made


def verdict_of(made: Graph) -> object:
    return verdict(next(equation for equation in walk(made.equations) if equation.op == "paged_attention"))


def check(made: Graph, dtype: str, folder: Path, codes: str | None = None) -> None:
    engine, _ = lowered(made, {}.__getitem__, folder, "bf16" if dtype == "bf16" else "fp32")
    engine.allocate(8)  # full of NaN: nothing may read what was not written
    kinds = {equation.attr["name"]: equation.result.type for equation in walk(made.equations) if equation.op == "state"}
    states = {
        str(name): torch.full(
            [8, *kind.shape[1:]], 255 if kind.dtype == "u8" else torch.nan, dtype=torch_dtype(kind.dtype)
        )
        for name, kind in kinds.items()
    }
    generator = torch.Generator().manual_seed(3)
    # (code - zero) scale has two roundings, of numbers that may be twice as large as what they give
    bound = tolerance("paged_attention", dtype).times(1 if codes is None else 2)
    past = dict.fromkeys(BLOCKS, 0)
    sinks = torch.randn(4, generator=generator).to(torch_dtype(dtype))
    for call in CALLS:
        begins, blocks, block_begins = [0], [], [0]
        for number, new in call.items():
            begins.append(begins[-1] + new)
            # sequence 1 has its blocks from the start, as a runtime that reserves gives them
            blocks += BLOCKS[number] if number == 1 else BLOCKS[number][: -(-(past[number] + new) // 32)]
            block_begins.append(len(blocks))
        numbers = {
            "past_lens": [past[number] for number in call], "seq_begins": begins, "block_ids": blocks,
            "block_begins": block_begins, "max_context": max(past[number] + new for number, new in call.items()),
            "prefix": [12 + number for number in call],
        }  # fmt: skip
        inputs: dict[str, torch.Tensor] = {}
        for value in made.inputs:
            if value.name in numbers:
                inputs[value.name] = torch.tensor(numbers[value.name], dtype=torch.int32)
            elif value.name == "sinks":
                inputs["sinks"] = sinks
            else:
                shape = (begins[-1], *(int(size) for size in value.type.shape[1:]))
                if codes is not None and value.name in ("k", "v"):
                    inputs[value.name] = on_grid(shape, codes, generator, dtype != "f32").to(torch_dtype(dtype))
                    continue
                inputs[value.name] = (torch.randn(shape, generator=generator) * 1.5).to(torch_dtype(dtype))
        expected = run(made, inputs, {}.__getitem__, states)["y"].double()
        got = engine(inputs)["y"].double()
        difference = (got - expected).abs()
        excess = difference - bound.absolute - bound.relative * expected.abs()
        assert excess.max() <= 0, f"{call}: off by {difference.max():.3g}, tolerance {bound}"
        for number, new in call.items():
            past[number] += new


def test_each_supported_type_is_run_here() -> None:
    for op in ("paged_attention", "state"):
        row = capabilities.TABLE[op]
        assert {dtype for dtype, found in row.items() if not isinstance(found, Unsupported)} >= {"f32", "bf16"}


COMBINATIONS = [names for size in range(len(FEATURES) + 1) for names in combinations(FEATURES, size)]


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("features", COMBINATIONS, ids=lambda names: "+".join(names) or "plain")
def test_features(features: tuple[str, ...], dtype: str, tmp_path: Path) -> None:
    made = graph(features, dtype)
    assert isinstance(verdict_of(made), Emit if frozenset(features) in PAGED_NATIVE else Decompose)
    check(made, dtype, tmp_path)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 1), (12, 3), (1, 1)])
def test_heads(heads: int, groups: int, dtype: str, tmp_path: Path) -> None:
    check(graph((), dtype, heads, groups), dtype, tmp_path)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("dim", [8, 20, 48, 64, 80, 96, 128, 160, 256])
def test_head_sizes(dim: int, dtype: str, tmp_path: Path) -> None:
    check(graph((), dtype, dim=dim), dtype, tmp_path)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("features", [(), ("window", "sinks"), ("slopes",), ("softcap",)], ids="+".join)
def test_values_of_another_size_than_keys(features: tuple[str, ...], dtype: str, tmp_path: Path) -> None:
    check(graph(features, dtype, dim=48, wide=32), dtype, tmp_path)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("others", [(), ("softcap",)], ids="+".join)
def test_biases_in_bfloat16(others: tuple[str, ...], dtype: str, tmp_path: Path) -> None:
    made = graph(("slopes", "bf16_bias", *others), dtype)
    assert isinstance(verdict_of(made), Decompose)
    check(made, dtype, tmp_path)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("features", COMBINATIONS, ids=lambda names: "+".join(names) or "plain")
def test_codes(features: tuple[str, ...], dtype: str, tmp_path: Path) -> None:
    made = graph(features, dtype, codes="u8")
    assert isinstance(verdict_of(made), Emit if frozenset(features) in PAGED_NATIVE else Decompose)
    check(made, dtype, tmp_path, "u8")


@pytest.mark.parametrize(("dim", "wide"), [(8, 8), (20, 20), (80, 80), (48, 32), (128, 128), (192, 128), (256, 256)])
def test_codes_of_head_sizes(dim: int, wide: int, tmp_path: Path) -> None:
    check(graph((), "f32", dim=dim, wide=wide, codes="u8"), "f32", tmp_path, "u8")


# Combinations that the native operation has inputs for and that the table does not list.
NOT_NATIVE = [("window", "slopes"), ("slopes", "sinks"), ("window", "slopes", "sinks")]


@pytest.mark.parametrize("features", NOT_NATIVE, ids="+".join)
def test_what_is_not_native_would_be_wrong(
    features: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strict: where an OpenVINO computes one of these right, it belongs into PAGED_NATIVE."""
    monkeypatch.setattr(capabilities, "PAGED_NATIVE", (frozenset(features),))
    made = graph(features, "f32")
    assert isinstance(verdict_of(made), Emit)
    with pytest.raises((AssertionError, RuntimeError)):
        check(made, "f32", tmp_path)
