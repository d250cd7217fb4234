"""Type rules: what every operation accepts and gives, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from compiler.ir import Builder, TensorType, Value
from compiler.ir.core import Arg
from compiler.ir.ops import REGISTRY, TypeRuleError
from compiler.ir.parser import parse
from specs.errors import Where
from tests.golden_errors import check_raises


def typed(text: str) -> TensorType:
    return parse(f"graph g(%x: {text}) {{ return x = %x }}").inputs[0].type


def infer(op: str, operands: list[Any], attrs: dict[str, Any]) -> str:
    args: list[Arg] = [Value(f"v{i}", typed(o)) if isinstance(o, str) else o for i, o in enumerate(operands)]
    declared = attrs.pop("type", None)
    types = REGISTRY[op].infer_types(args, attrs, None if declared is None else typed(declared))
    return ", ".join(map(str, types))


_QKV = ["f32[B,S,4,8]", "f32[B,S,2,8]", "f32[B,S,2,16]"]
_PAGED = ["f32[T,4,8]", "f32[T,2,8]", "f32[T,2,16]", "bf16[C,2,32,8]", "bf16[C,2,32,16]",
          "i32[B]", "i32[B1]", "i32[P]", "i32[B1]", "i32[]"]  # fmt: skip
_CACHED = ["f32[B,S,4,8]", "f32[B,2,64,8]", "f32[B,2,64,16]", "i32[B,S]"]
_CODED = [*_PAGED[:3], "u8[C,2,32,16]", "u8[C,2,32,24]", *_PAGED[5:]]
_OPTIONS = {"scale": 0.125, "causal": True}
Row = tuple[str, list[Any], dict[str, Any], str]

ACCEPTED: list[Row] = [
    ("weight", [], {"name": "w", "type": "bf16[2,3]"}, "bf16[2,3]"),
    ("state", [], {"name": "c", "type": "f32[C,2]"}, "f32[C,2]"),
    ("const", [], {"value": 1.5, "type": "f32[]"}, "f32[]"),
    ("const", [], {"value": ((1, 2), (3, 4)), "type": "i32[2,2]"}, "i32[2,2]"),
    ("const", [], {"value": (True,), "type": "bool[1]"}, "bool[1]"),
    ("const", [], {"value": (1, 2.5), "type": "f32[2]"}, "f32[2]"),
    ("repeat", ["f32[B,8]", "i32[B]"], {"count": 3}, "f32[B,8], i32[B]"),
    ("add", ["f32[B,S,8]", "f32[8]"], {}, "f32[B,S,8]"),
    ("add", ["f32[B,1,S]", "f32[B,S,1]"], {}, "f32[B,S,S]"),
    ("sub", [1.0, "f16[B]"], {}, "f16[B]"),
    ("mul", ["i32[B]", 3], {}, "i32[B]"),
    ("div", ["f32[]", "f32[4]"], {}, "f32[4]"),
    ("maximum", ["f32[4]", 0.0], {}, "f32[4]"),
    ("minimum", ["f32[4]", "f32[1]"], {}, "f32[4]"),
    ("compare", ["i32[B,1]", "i32[1,S]"], {"kind": "le"}, "bool[B,S]"),
    ("and", ["bool[B,1]", "bool[S]"], {}, "bool[B,S]"),
    ("or", ["bool[4]", "bool[4]"], {}, "bool[4]"),
    ("where", ["bool[B,1]", "f32[S]", 0.0], {}, "f32[B,S]"),
    *[(op, ["f16[B,8]"], {}, "f16[B,8]")
      for op in ("exp", "rsqrt", "cos", "sin", "tanh", "erf", "sigmoid", "relu", "silu")],
    ("gelu", ["f32[B]"], {"approximate": True}, "f32[B]"),
    ("cast", ["i32[B,8]"], {"dtype": "f32"}, "f32[B,8]"),
    ("quantize", ["f32[T,8]", "f32[T,1]"], {"dtype": "i8"}, "i8[T,8]"),
    ("quantize", ["bf16[T,8]", "f8e8m0[T,2]"], {"dtype": "f4e2m1", "block": (1, 4)}, "f4e2m1[T,8]"),
    ("quantize", ["f32[T,8]", "f32[1]", "u8[1]"], {"dtype": "u8"}, "u8[T,8]"),
    ("dequantize", ["i4[6,8]", "f16[6,2]", "u4[6,2]"], {"dtype": "f32", "block": (1, 4)}, "f32[6,8]"),
    ("dequantize", ["f8e4m3[6,8]", "f32[2,3]"], {"dtype": "bf16", "block": (3, 3)}, "bf16[6,8]"),
    ("dequantize", ["f4e2m1[6,8]", "f8e4m3[6,2]", None, "f32[1]"], {"dtype": "f32", "block": (1, 4)}, "f32[6,8]"),
    ("row_scale", ["f32[T,8]"], {"dtype": "i8"}, "f32[T,1]"),
    ("row_scale", ["f32[T,9]"], {"dtype": "f8e4m3", "scale": "f8e8m0", "block": 4}, "f8e8m0[T,3]"),
    ("matmul", ["f32[B,S,8]", "f32[8,4]"], {}, "f32[B,S,4]"),
    ("matmul", ["f32[B,S,8]", "f32[4,8]"], {"transpose_b": True}, "f32[B,S,4]"),
    ("matmul", ["f32[B,2,3,S,8]", "f32[B,2,1,8,S]"], {}, "f32[B,2,3,S,S]"),
    ("gather", ["bf16[32,8]", "i32[B,S]"], {}, "bf16[B,S,8]"),
    ("gather", ["f32[B,S,8]", "i32[N]"], {"dims": 2}, "f32[N,8]"),
    ("mean", ["f32[B,8]"], {}, "f32[B,1]"),
    ("sum", ["f32[8]"], {}, "f32[1]"),
    ("softmax", ["bf16[B,8]"], {}, "bf16[B,8]"),
    ("softmax", ["f32[B,4,S,S]", "f32[4,1,1]"], {}, "f32[B,4,S,S]"),
    ("top_k", ["f16[B,S,8]"], {"k": 3}, "i32[B,S,3]"),
    ("take", ["i32[B,S,8]", "i32[B,S,3]"], {}, "i32[B,S,3]"),
    ("gather_matmul", ["bf16[T,1,8]", "bf16[5,6,8]", "i32[T,2]"], {}, "bf16[T,2,6]"),
    ("gather_matmul", ["f32[B,S,2,8]", "f32[5,6,8]", "i32[B,S,2]"], {}, "f32[B,S,2,6]"),
    ("reshape", ["f32[B,S,8]"], {"shape": ("B", "S", 2, 4)}, "f32[B,S,2,4]"),
    ("transpose", ["f32[B,S,2,4]"], {"axes": (-2, -3, -1)}, "f32[B,2,S,4]"),
    ("concat", ["f32[B,4]", "f32[B,2]", "f32[B,1]"], {"axis": -1}, "f32[B,7]"),
    ("slice", ["f32[B,8]"], {"axis": -1, "start": 2, "stop": 5}, "f32[B,3]"),
    ("slice", ["f32[B,S,8]"], {"axis": -2, "start": 0, "stop": 1}, "f32[B,1,8]"),
    ("rms_norm", ["f16[B,S,8]", "f16[8]"], {"eps": 1e-5}, "f16[B,S,8]"),
    ("layer_norm", ["f32[B,8]"], {"eps": 1e-5}, "f32[B,8]"),
    ("layer_norm", ["f32[B,8]", "f32[8]"], {"eps": 1e-5}, "f32[B,8]"),
    ("layer_norm", ["f32[B,8]", "f32[8]", "f32[8]"], {"eps": 1e-5}, "f32[B,8]"),
    ("rotate", ["bf16[T,4,8]", "f32[T,2]", "f32[T,2]"], {"style": "half"}, "bf16[T,4,8]"),
    ("attention", [*_QKV, "i32[B,S]"], _OPTIONS, "f32[B,S,4,16]"),
    ("attention", [*_QKV, "i32[B,S]", None, "f32[4]"], {**_OPTIONS, "window": 3, "slopes": (1, 2, 3, 4)},
     "f32[B,S,4,16]"),
    ("paged_attention", _PAGED, _OPTIONS, "f32[T,4,16]"),
    ("update_cache", ["bf16[B,2,64,8]", "bf16[B,S,2,8]", "i32[B]"], {}, "bf16[B,2,64,8]"),
    ("cached_attention", _CACHED, {"scale": 0.125}, "f32[B,S,4,16]"),
    ("all_reduce", ["f16[T,8]"], {"ranks": 2}, "f16[T,8]"),
    ("all_gather", ["f16[T,8]"], {"axis": -1, "ranks": 4}, "f16[T,32]"),
    ("cached_attention", [*_CACHED, None, "f32[4]"], {"scale": 0.125, "window": 4}, "f32[B,S,4,16]"),
    ("paged_attention", [*_PAGED, "i32[B]"], {**_OPTIONS, "softcap": 30.0}, "f32[T,4,16]"),
    ("paged_attention", _CODED, {**_OPTIONS, "codes": "u8"}, "f32[T,4,16]"),
]  # fmt: skip

REFUSED: list[Row] = [
    ("weight", [], {"name": "w"}, "states its type"),
    ("weight", [], {"name": "w", "type": "f32[B]"}, "must be numbers"),
    ("weight", ["f32[2]"], {"name": "w", "type": "f32[2]"}, "takes 0 operands, got 1"),
    ("const", [], {"value": (1.0, 2.0), "type": "f32[3]"}, "no f32[3]"),
    ("const", [], {"value": ((1.0,), (1.0, 2.0)), "type": "f32[2,1]"}, "rectangular"),
    ("const", [], {"value": 1.5, "type": "i32[]"}, "no i32"),
    ("const", [], {"value": 1, "type": "bool[]"}, "no bool"),
    ("const", [], {"value": "text", "type": "f32[]"}, "no f32"),
    ("repeat", ["f32[2]"], {"count": 0}, "0 times"),
    ("repeat", [], {"count": 1}, "got none"),
    ("add", ["f32[B]", "f32[S]"], {}, "do not broadcast"),
    ("add", ["f32[4]", "f16[4]"], {}, "different types: f16, f32"),
    ("add", ["bool[4]", "bool[4]"], {}, "arithmetic on bool"),
    ("mul", [1.0, 2.0], {}, "write the number"),
    ("compare", ["f32[4]", 0.0], {"kind": "less"}, "unknown comparison"),
    ("and", ["f32[4]", "f32[4]"], {}, "must be bool, got f32"),
    ("where", ["f32[4]", "f32[4]", 0.0], {}, "condition"),
    ("exp", ["i32[4]"], {}, "must be F, got i32"),
    ("exp", [1.0], {}, "must be a value"),
    ("gelu", ["f32[4]"], {}, "lacks its attribute `approximate`"),
    ("cast", ["f32[4]"], {"dtype": "f12"}, "unknown element type"),
    ("matmul", ["f32[B,8]", "f32[4,8]"], {}, "inner dims differ"),
    ("matmul", ["f32[8]", "f32[8,4]"], {}, "ranks of 2"),
    ("matmul", ["f32[B,8]", "bf16[8,4]"], {}, "one float type"),
    ("gather", ["f32[4,8]", "f32[B]"], {}, "must be I, got f32"),
    ("gather", ["f32[4,8]", "i32[B]"], {"dims": 3}, "takes a table of 3 dims or more"),
    ("mean", ["f32[]"], {}, "scalar"),
    ("mean", ["i32[4]"], {}, "must be F, got i32"),
    ("softmax", ["f32[B,S]", "f32[S,B]"], {}, "no logit for each row"),
    ("softmax", ["f32[B,S]", "f16[1]"], {}, "no logit for each row"),
    ("top_k", ["f32[B,8]"], {"k": 9}, "can't take the 9 largest"),
    ("top_k", ["f32[B,S]"], {"k": 1}, "can't take the 1 largest"),
    ("take", ["f32[B,8]", "i32[S,2]"], {}, "`*N` is [S], expected [B]"),
    ("gather_matmul", ["f32[T,3,8]", "f32[5,6,8]", "i32[T,2]"], {}, "must be 1 or as many"),
    ("gather_matmul", ["f32[T,1,8]", "f32[5,6,4]", "i32[T,2]"], {}, "`M` is [4], expected [8]"),
    ("reshape", ["f32[B,8]"], {"shape": ("B", 9)}, "element counts differ"),
    ("reshape", ["f32[B,S]"], {"shape": ("B", "B")}, "element counts differ"),
    ("transpose", ["f32[B,8]"], {"axes": (-1, -1)}, "no permutation"),
    ("transpose", ["f32[8]"], {"axes": (-1, -2)}, "no permutation"),
    ("concat", ["f32[B,4]", "f32[S,4]"], {"axis": -1}, "can't concatenate"),
    ("concat", ["f32[B,4]", "f32[B,4]"], {"axis": -2}, "symbolic dim `B`"),
    ("concat", ["f32[4]"], {"axis": -2}, "outside"),
    ("concat", [], {"axis": -1}, "got none"),
    ("slice", ["f32[B,8]"], {"axis": -1, "start": 4, "stop": 9}, "can't take 4:9"),
    ("slice", ["f32[B,8]"], {"axis": -2, "start": 0, "stop": 2}, "can't take"),
    ("rms_norm", ["f32[B,8]", "f32[4]"], {"eps": 1e-5}, "`M` is [4], expected [8]"),
    ("rms_norm", ["f32[B,8]", "f16[8]"], {"eps": 1e-5}, "must be f32, got f16"),
    ("rotate", ["f32[T,4,8]", "f32[T,5]", "f32[T,5]"], {"style": "half"}, "can't rotate 5 pairs of 8"),
    ("rotate", ["f32[T,4,8]", "f32[T,2]", "f32[T,2]"], {"style": "pairs"}, "unknown style"),
    ("attention", ["f32[B,S,5,8]", *_QKV[1:], "i32[B,S]"], _OPTIONS, "5 query heads do not share 2 key heads"),
    ("attention", [*_QKV, "i32[B,S]"], {**_OPTIONS, "slopes": (0.5,)}, "1 slopes for 4 heads"),
    ("attention", [*_QKV, "i32[B,S]"], {**_OPTIONS, "bf16_bias": 0.5}, "`bf16_bias` without slopes"),
    ("attention", [*_QKV, "i32[B]"], _OPTIONS, "must have shape [B,S]"),
    ("attention", [*_QKV, None], _OPTIONS, "can't be left out"),
    ("paged_attention", [*_PAGED[:3], "f32[C,2,32,8]", *_PAGED[4:]], _OPTIONS, "must be f32, got bf16"),
    ("update_cache", ["bf16[B,2,64,8]", "f32[B,S,2,8]", "i32[B]"], {}, "must be bf16, got f32"),
    ("all_reduce", ["f16[T,8]"], {"ranks": 1}, "an exchange between 1 ranks"),
    ("all_gather", ["f16[T,8]"], {"axis": -2, "ranks": 2}, "can't gather f16[T,8] along -2"),
    ("update_cache", ["f32[B,3,64,8]", "f32[B,S,2,8]", "i32[B]"], {}, "`K` is [2], expected [3]"),
    ("cached_attention", ["f32[B,S,3,8]", *_CACHED[1:]], {"scale": 1.0}, "3 query heads do not share 2 key heads"),
    ("paged_attention", _CODED, _OPTIONS, "a row of `k_cache` must have 8 elements, got 16"),
    ("paged_attention", _CODED, {**_OPTIONS, "codes": "i4"}, "a cache has codes of u8, f8e4m3, not i4"),
    ("paged_attention", _PAGED, {**_OPTIONS, "codes": "u8"}, "rows of codes are bytes, u8, got bf16"),
    (
        "paged_attention",
        [*_CODED[:4], "u8[C,2,32,16]", *_CODED[5:]],
        {**_OPTIONS, "codes": "f8e4m3"},
        "a row of `v_cache` must have 24 elements, got 16",
    ),
    ("paged_attention", _PAGED[:-1], _OPTIONS, "takes 10 to 12 operands, got 9"),
]


def ids(rows: list[Row]) -> list[str]:
    return [f"{index}-{row[0]}" for index, row in enumerate(rows)]


@pytest.mark.parametrize(("op", "operands", "attrs", "result"), ACCEPTED, ids=ids(ACCEPTED))
def test_accepted(op: str, operands: list[Any], attrs: dict[str, Any], result: str) -> None:
    assert infer(op, operands, dict(attrs)) == result


@pytest.mark.parametrize(("op", "operands", "attrs", "reason"), REFUSED, ids=ids(REFUSED))
def test_refused(op: str, operands: list[Any], attrs: dict[str, Any], reason: str) -> None:
    with pytest.raises(TypeRuleError) as caught:
        infer(op, operands, dict(attrs))
    assert reason in str(caught.value)


def test_every_operation_is_in_the_tables() -> None:
    assert {row[0] for row in ACCEPTED} == set(REGISTRY)
    assert len(REGISTRY) <= 49  # the design says about 40: a new one needs a better reason than convenience


def test_every_operation_says_what_it_means() -> None:
    for name, definition in REGISTRY.items():
        assert definition.doc, name
        assert definition.signature.count("->") == 1


def test_the_builder_reports_a_refusal_with_its_place() -> None:
    builder = Builder()
    builder.where = Where("model.yaml", 4, 7)
    x = builder.input("x", "f32", "B", 8)
    w = builder.emit("weight", to="w", type=TensorType("f32", (4, 4)), name="w")
    check_raises("IR-002", builder.emit, "matmul", x, w, to="y", transpose_b=True)
    builder.where = Where("model.yaml", 5, 3)
    check_raises("IR-002-repeat", builder.repeat, 2, [x], ["x"], lambda _: [w])


def test_the_builder_keeps_names_unique_and_drops_operands_left_out() -> None:
    builder = Builder()
    x = builder.input("x", "f32", 2, 8)
    w = builder.emit("weight", to="w", type=TensorType("f32", (8,)), name="w")
    first = builder.emit("layer_norm", x, w, None, to="y", eps=1e-5)
    second = builder.emit("exp", first, to="y")
    assert (first.name, second.name) == ("y", "y.2")
    assert builder.equations[1].args == (x, w)
