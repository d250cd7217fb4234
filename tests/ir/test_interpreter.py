"""The reference interpreter: every operation against NumPy in float64, `repeat`, states, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from compiler.ir import Graph
from compiler.ir.formats import HALF_BYTES
from compiler.ir.interpreter import ir_dtype, run, torch_dtype
from compiler.ir.ops import REGISTRY
from compiler.ir.parser import parse
from compiler.ir.types import DTYPES
from tests.golden_errors import check_raises

# float32 against float64: inputs are of size 1 and sums have fewer than 100 terms, each rounded to 2^-24.
TOLERANCE = 1e-5


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, style: str) -> np.ndarray:
    """Each pair as a complex number, times cos + i sin."""
    out, pairs = x.copy(), cos.shape[-1]
    for j in range(pairs):
        a, b = (j, j + pairs) if style == "half" else (2 * j, 2 * j + 1)
        turned = (x[..., a] + 1j * x[..., b]) * (cos[..., j] + 1j * sin[..., j])[..., None]
        out[..., a], out[..., b] = turned.real, turned.imag
    return out


X, Y, POSITIVE = randn(3, 8), randn(3, 8, seed=1), randn(3, 8, seed=2).abs() + 0.1
W, B = randn(8, seed=3), randn(8, seed=4)
FLAGS = X > 0
EXPERTS, CHOSEN = randn(4, 5, 8), torch.tensor([[2, 0], [1, 1], [2, 1]], dtype=torch.int32)  # nobody chose the last
_erf = np.vectorize(math.erf)
_MEANINGS: list[tuple[str, tuple[Any, ...], dict[str, Any], Callable[..., Any]]] = [
    ("add", (X, Y), {}, np.add),
    ("sub", (1.0, Y), {}, np.subtract),
    ("mul", (X, W), {}, np.multiply),
    ("div", (X, POSITIVE), {}, np.divide),
    ("maximum", (X, 0.25), {}, np.maximum),
    ("minimum", (0.25, X), {}, np.minimum),
    ("compare", (X, Y), {"kind": "lt"}, np.less),
    ("compare", (X, 0.0), {"kind": "ge"}, np.greater_equal),
    ("and", (FLAGS, Y > 0), {}, np.logical_and),
    ("or", (FLAGS, Y > 0), {}, np.logical_or),
    ("where", (FLAGS, X, -1.0), {}, np.where),
    ("exp", (X,), {}, np.exp),
    ("rsqrt", (POSITIVE,), {}, lambda x: 1 / np.sqrt(x)),
    ("cos", (X,), {}, np.cos),
    ("sin", (X,), {}, np.sin),
    ("tanh", (X,), {}, np.tanh),
    ("erf", (X,), {}, _erf),
    ("sigmoid", (X,), {}, lambda x: 1 / (1 + np.exp(-x))),
    ("relu", (X,), {}, lambda x: np.maximum(x, 0)),
    ("silu", (X,), {}, lambda x: x / (1 + np.exp(-x))),
    ("gelu", (X,), {"approximate": False}, lambda x: x / 2 * (1 + _erf(x / np.sqrt(2)))),
    ("gelu", (X,), {"approximate": True}, lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
    ("cast", (X,), {"dtype": "i32"}, np.trunc),
    ("matmul", (X, randn(8, 4)), {}, np.matmul),
    ("matmul", (X, Y), {"transpose_b": True}, lambda x, y: x @ y.T),
    ("gather", (X, torch.tensor([[2, 0], [1, 1]], dtype=torch.int32)), {}, lambda x, i: x[i.astype(int)]),
    ("gather", (torch.stack((X, -X)), torch.tensor([4, 0], dtype=torch.int32)), {"dims": 2},
     lambda x, i: x.reshape(-1, x.shape[-1])[i.astype(int)]),
    ("mean", (X,), {}, lambda x: x.mean(-1, keepdims=True)),
    ("sum", (X,), {}, lambda x: x.sum(-1, keepdims=True)),
    ("softmax", (X,), {}, softmax),
    ("softmax", (X, POSITIVE[:, :1]), {}, lambda x, s: softmax(np.concatenate((x, s), -1))[:, :-1]),
    ("top_k", (torch.cat((X, X), -1),), {"k": 5}, lambda x: np.argsort(-x, -1, kind="stable")[:, :5]),
    ("take", (X, CHOSEN), {}, lambda x, i: np.take_along_axis(x, i.astype(int), -1)),
    ("gather_matmul", (X[:, None], EXPERTS, CHOSEN), {},
     lambda x, w, i: np.einsum("tkom,tm->tko", w[i.astype(int)], x[:, 0])),
    ("gather_matmul", (randn(3, 2, 8), EXPERTS, CHOSEN), {},
     lambda x, w, i: np.einsum("tkom,tkm->tko", w[i.astype(int)], x)),
    ("reshape", (X,), {"shape": (2, 12)}, lambda x: x.reshape(2, 12)),
    ("transpose", (randn(2, 3, 4),), {"axes": (-1, -2)}, lambda x: x.swapaxes(-1, -2)),
    ("transpose", (randn(2, 3, 4),), {"axes": (-2, -1, -3)}, lambda x: x.transpose(1, 2, 0)),
    ("concat", (X, Y[:, :2]), {"axis": -1}, lambda x, y: np.concatenate((x, y), -1)),
    ("slice", (X,), {"axis": -1, "start": 2, "stop": 5}, lambda x: x[:, 2:5]),
    ("rms_norm", (X, W), {"eps": 1e-5}, lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w),
    ("layer_norm", (X,), {"eps": 1e-5},
     lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)),
    ("layer_norm", (X, W), {"eps": 1e-5},
     lambda x, w: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w),
    ("layer_norm", (X, W, B), {"eps": 1e-5},
     lambda x, w, b: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * w + b),
    *[("rotate", (randn(3, 2, 8), randn(3, 3).cos(), randn(3, 3).sin()), {"style": style},
       lambda x, c, s, style=style: rotated(x, c, s, style)) for style in ("half", "interleaved")],
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "args", "attrs", "meaning"), _MEANINGS, ids=[f"{i}-{row[0]}" for i, row in enumerate(_MEANINGS)]
)
def test_meaning(op: str, args: tuple[Any, ...], attrs: dict[str, Any], meaning: Callable[..., Any]) -> None:
    got = REGISTRY[op].body(*args, **attrs)
    wide = [arg if not isinstance(arg, torch.Tensor) or arg.dtype == torch.bool else arg.double() for arg in args]
    want = meaning(*(arg.numpy() if isinstance(arg, torch.Tensor) else arg for arg in wide))
    np.testing.assert_allclose(got.double().numpy(), np.asarray(want, dtype=float), atol=TOLERANCE, rtol=TOLERANCE)


# -- attention, against loops over heads and positions ---------------------------------------------------------------

_DEFAULTS: dict[str, Any] = {
    "causal": True,
    "window": None,
    "softcap": None,
    "slopes": None,
    "bf16_bias": None,
    "prefix": None,
    "sinks": None,
}
ATTENTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "prefix": {"prefix": 3},
    "window": {"window": 2},
    "full_window": {"causal": False, "window": 2},
    "softcap": {"softcap": 1.5},
    "slopes": {"slopes": (0.5, 0.25, 0.125, 0.0625)},
    "bf16_bias": {"slopes": (0.84, 0.71, 0.59, 0.3), "bf16_bias": 0.7},
    "sinks": {"sinks": (0.3, -1.0, 2.0, 0.0)},
    "all": {
        "prefix": 2,
        "window": 4,
        "softcap": 2.0,
        "slopes": (0.5, 0.25, 0.125, 0.0625),
        "sinks": (0.3, -1.0, 2.0, 0.0),
    },
}


def linear_bias(slope: float, position: int, factor: float | None) -> float:
    if factor is None:
        return slope * position
    return eight_bits(eight_bits(slope) * eight_bits(position)) * factor


def eight_bits(number: float) -> float:
    """The nearest number of 8 significant bits, of two the even one."""
    if number == 0:
        return 0.0
    unit = 2.0 ** (np.floor(np.log2(number)) - 7)
    return float(np.round(number / unit) * unit)


def attention_by_loops(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, options: dict[str, Any]
) -> np.ndarray:
    """One sequence: q[S,H,D], k[S,K,D], v[S,K,E]."""
    options = _DEFAULTS | options
    out = np.zeros((q.shape[0], q.shape[1], v.shape[2]))
    for head in range(q.shape[1]):
        group = head // (q.shape[1] // k.shape[1])
        for i in range(q.shape[0]):
            logits, seen = [], []
            for j in range(k.shape[0]):
                if options["causal"] and j > i and not (options["prefix"] is not None and j < options["prefix"]):
                    continue
                if options["window"] is not None and i - j >= options["window"]:
                    continue
                score = q[i, head] @ k[j, group] * scale
                if options["softcap"] is not None:
                    score = options["softcap"] * np.tanh(score / options["softcap"])
                if options["slopes"] is not None:
                    score += linear_bias(options["slopes"][head], j, options["bf16_bias"])
                logits.append(score)
                seen.append(j)
            if options["sinks"] is not None:
                logits.append(options["sinks"][head])
            weights = softmax(np.array(logits))[: len(seen)]
            out[i, head] = weights @ v[seen, group]
    return out


def attention_inputs(
    options: dict[str, Any],
) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor | None, dict[str, Any]]:
    qkv = [randn(2, 7, 4, 6), randn(2, 7, 2, 6), randn(2, 7, 2, 5)]
    prefix = options.get("prefix")
    sinks = options.get("sinks")
    rest = {key: value for key, value in options.items() if key not in ("prefix", "sinks")}
    return (
        qkv,
        None if prefix is None else torch.full((2,), prefix, dtype=torch.int32),
        None if sinks is None else torch.tensor(sinks),
        {"causal": True, **rest},
    )


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str) -> None:
    (q, k, v), prefix, sinks, options = attention_inputs(ATTENTIONS[name])
    positions = torch.arange(7, dtype=torch.int32).repeat(2, 1)
    positions[1, 4:] = -1  # the second row has 4 tokens
    got = REGISTRY["attention"].body(q, k, v, positions, prefix, sinks, scale=0.4, **options)
    for row, length in enumerate((7, 4)):
        one = [x[row, :length].double().numpy() for x in (q, k, v)]
        want = attention_by_loops(*one, 0.4, ATTENTIONS[name])
        np.testing.assert_allclose(got[row, :length].numpy(), want, atol=TOLERANCE)
    assert torch.isfinite(got).all()  # padding too


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if not name.startswith("full")])  # nothing to cache there
def test_paged_attention(name: str) -> None:
    """Two sequences in blocks of 4, in two steps, the second sequence joining late; blocks out of order."""
    (q, k, v), prefix, sinks, options = attention_inputs(ATTENTIONS[name])
    caches = [torch.full((5, 2, 4, size), 7.0) for size in (6, 5)]
    blocks = {0: [3, 1], 1: [4]}
    steps = [{0: (0, 5)}, {0: (5, 7), 1: (0, 4)}]
    out: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for step in steps:
        packed = [torch.cat([x[row, start:stop] for row, (start, stop) in step.items()]) for x in (q, k, v)]
        sizes = [stop - start for start, stop in step.values()]
        table = [block for row in step for block in blocks[row]]
        meta = [
            [start for start, _ in step.values()], [0, *np.cumsum(sizes).tolist()], table,
            [0, *np.cumsum([len(blocks[row]) for row in step]).tolist()],
        ]  # fmt: skip
        got = REGISTRY["paged_attention"].body(
            *packed, *caches, *(torch.tensor(values, dtype=torch.int32) for values in meta), torch.tensor(7),
            None if prefix is None else prefix[: len(step)], sinks, scale=0.4, **options,
        )  # fmt: skip
        for row, part in zip(step, got.split(sizes), strict=True):
            out[row].append(part)
    for row, length in ((0, 7), (1, 4)):
        one = [x[row, :length].double().numpy() for x in (q, k, v)]
        want = attention_by_loops(*one, 0.4, ATTENTIONS[name])
        np.testing.assert_allclose(torch.cat(out[row]).numpy(), want, atol=TOLERANCE)
    assert (caches[0][[0, 2]] == 7).all()  # blocks of nobody are left alone


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if not name.startswith("full")])
def test_cached_attention(name: str) -> None:
    """Two sequences in one linear cache of 9 places, the second three tokens behind."""
    (q, k, v), prefix, sinks, options = attention_inputs(ATTENTIONS[name])
    caches = [torch.full((2, 2, 9, size), 7.0) for size in (6, 5)]
    options = {key: value for key, value in options.items() if key != "causal"}
    out: list[list[torch.Tensor]] = [[], []]
    for starts, count in (((0, 0), 4), ((4, 1), 3)):
        rows = [torch.stack([x[row, start : start + count] for row, start in enumerate(starts)]) for x in (q, k, v)]
        past = torch.tensor(starts, dtype=torch.int32)
        keys, values = (
            REGISTRY["update_cache"].body(cache, x, past) for cache, x in zip(caches, rows[1:], strict=True)
        )
        at = past[:, None] + torch.arange(count)
        got = REGISTRY["cached_attention"].body(rows[0], keys, values, at, prefix, sinks, scale=0.4, **options)
        for row in range(2):
            out[row].append(got[row])
    for row, length in ((0, 7), (1, 4)):
        one = [x[row, :length].double().numpy() for x in (q, k, v)]
        want = attention_by_loops(*one, 0.4, ATTENTIONS[name])
        found = torch.cat(out[row]) if row == 0 else torch.cat((out[1][0][:1], out[1][1]))
        np.testing.assert_allclose(found.numpy(), want, atol=TOLERANCE)
    assert (caches[0][:, :, 7:] == 7).all()  # what was not written


def test_every_operation_has_a_test_of_its_meaning() -> None:
    here = {row[0] for row in _MEANINGS} | {"attention", "paged_attention", "weight", "const", "state", "repeat"}
    here |= {"update_cache", "cached_attention"}
    here |= {"all_reduce", "all_gather"}  # test_ranks.py
    here |= {"quantize", "dequantize", "row_scale"}  # test_formats.py
    assert here == set(REGISTRY)


def test_sixteen_bits_compute_statistics_in_float32() -> None:
    x = (randn(4, 64) * 300).half()  # squares overflow float16
    weight = torch.ones(64).half()
    for op in ("rms_norm", "layer_norm"):
        got = REGISTRY[op].body(x, weight, eps=1e-5)
        assert got.dtype == torch.float16
        # 2^-11: one rounding of the result, which is of size up to 4
        assert (got.float() - REGISTRY[op].body(x.float(), weight.float(), eps=1e-5)).abs().max() <= 4 * 2**-11


# -- graphs ----------------------------------------------------------------------------------------------------------

_LOOP = """
graph g(%x: f32[B,2]) {
  dim B in 1..2..4
  %w: f32[2] = weight() {name = "w"}
  %c: f32[2] = const() {value = (10.0, 20.0)}
  %y: f32[B,2] = repeat(%x) {count = 3} (%p: f32[B,2]) => {
    %a: f32[2] = weight() {name = "layers.{i}.a"}
    %s: f32[B,2] = mul(%p, %a)
    %t: f32[B,2] = add(%s, %w)
    yield %t
  }
  %z: f32[B,2] = add(%y, %c)
  %r: f32[2,B] = transpose(%z) {axes = (-1, -2)}
  %v: f32[B,2,1] = reshape(%z) {shape = ("B", 2, 1)}
  return z = %z, r = %r, v = %v
}
"""
WEIGHTS = {"w": torch.tensor([1.0, 2.0]), **{f"layers.{i}.a": torch.tensor([i + 1.0, -1.0]) for i in range(3)}}


def loop() -> Graph:
    return parse(_LOOP)


def test_repeat_carries_values_and_counts_rounds_in_names() -> None:
    x = torch.tensor([[1.0, 1.0], [0.0, 2.0], [3.0, 0.0]])
    want = x.clone()
    for index in range(3):
        want = want * WEIGHTS[f"layers.{index}.a"] + WEIGHTS["w"]
    want = want + torch.tensor([10.0, 20.0])
    out = run(loop(), {"x": x}, WEIGHTS.__getitem__)
    assert torch.equal(out["z"], want)
    assert torch.equal(out["r"], want.T)
    assert out["v"].shape == (3, 2, 1)


def test_trace_sees_every_value_of_every_round() -> None:
    seen: dict[str, torch.Tensor] = {}
    run(loop(), {"x": torch.ones(2, 2)}, WEIGHTS.__getitem__, trace=seen.__setitem__)
    assert {"w", "y", "z", "s[0]", "s[1]", "s[2]", "t[2]"} <= seen.keys()
    assert torch.equal(seen["t[2]"], seen["y"])


def test_weights_are_cast_to_the_type_that_the_graph_states() -> None:
    graph = parse('graph g() { %w: bf16[2] = weight() {name = "w"} return w = %w }')
    assert run(graph, {}, lambda _: torch.tensor([1.0, 1.001]))["w"].dtype == torch.bfloat16


def test_states_live_between_runs_and_start_as_zeros() -> None:
    graph = parse('graph g() { %s: f32[2,3] = state() {name = "s"} %y: f32[2,3] = add(%s, 1.0) return y = %y }')
    states: dict[str, torch.Tensor] = {}
    assert torch.equal(run(graph, {}, WEIGHTS.__getitem__, states)["y"], torch.ones(2, 3))
    states["s"] += 4
    assert torch.equal(run(graph, {}, WEIGHTS.__getitem__, states)["y"], torch.full((2, 3), 5.0))


def test_dtypes_have_their_torch_type_and_back() -> None:
    for name in DTYPES.keys() - HALF_BYTES:
        assert ir_dtype(torch_dtype(name)) == name
    check_raises("IR-004-dtype", torch_dtype, "f64")


def test_what_does_not_fit_the_graph() -> None:
    check_raises("IR-004-missing", run, loop(), {}, WEIGHTS.__getitem__)
    check_raises("IR-004-rank", run, loop(), {"x": torch.ones(2)}, WEIGHTS.__getitem__)
    check_raises(
        "IR-004-dtype-of-input", run, loop(), {"x": torch.ones(2, 2, dtype=torch.float16)}, WEIGHTS.__getitem__
    )
    check_raises("IR-004-weight", run, loop(), {"x": torch.ones(2, 2)}, lambda _: torch.ones(3))
    two = parse("graph g(%x: f32[B,2], %y: f32[B,2]) { dim B in 1..2..4 %z: f32[B,2] = add(%x, %y) return z = %z }")
    check_raises("IR-004-dim", run, two, {"x": torch.ones(2, 2), "y": torch.ones(3, 2)}, WEIGHTS.__getitem__)
