"""What an attention kernel takes over: views into joined products, rotations, and what it leaves to the engine."""

from __future__ import annotations

from compiler.ir.parser import parse
from compiler.lower.attention_step import View, attention_steps
from compiler.lower.partition import partition

HEAD = """graph g(%qkv: f16[T,32], %cos: f32[T,2], %sin: f32[T,2], %past: i32[B], %begins: i32[B1], %ids: i32[P],
    %id_begins: i32[B1], %longest: i32[]) {
  dim T in 1..4..64
  dim B in 1..1..4
  dim B1 in 2..2..5
  dim P in 1..1..8
  dim C in 1..1..8
  %kc: f16[C,2,32,4] = state() {name = "k"}
  %vc: f16[C,2,32,4] = state() {name = "v"}
"""
SLICES = """
  %q0: f16[T,16] = slice(%qkv) {axis = -1, start = 0, stop = 16}
  %k0: f16[T,8] = slice(%qkv) {axis = -1, start = 16, stop = 24}
  %v0: f16[T,8] = slice(%qkv) {axis = -1, start = 24, stop = 32}
  %q1: f16[T,4,4] = reshape(%q0) {shape = ("T", 4, 4)}
  %k1: f16[T,2,4] = reshape(%k0) {shape = ("T", 2, 4)}
  %v1: f16[T,2,4] = reshape(%v0) {shape = ("T", 2, 4)}
"""
TURNS = """
  %q2: f16[T,4,4] = rotate(%q1, %cos, %sin) {style = "half"}
  %k2: f16[T,2,4] = rotate(%k1, %cos, %sin) {style = "half"}
"""
CALL = """
  %y: f16[T,4,4] = paged_attention(%Q, %K, %v1, %kc, %vc, %past, %begins, %ids, %id_begins, %longest)
    {scale = 0.5, causal = true}
"""


def graph(body: str, q: str = "q2", k: str = "k2", result: str = "y"):  # type: ignore[no-untyped-def]
    call = CALL.replace("%Q", f"%{q}").replace("%K", f"%{k}")
    return parse(HEAD + body.replace("CALL", call) + f"  return {result} = %{result}\n}}\n")


def test_slices_of_a_joined_product_are_views() -> None:
    found = attention_steps(graph(SLICES + TURNS + "CALL"))["y"]
    (qkv,) = {view.value.name for view in (found.q, found.k, found.v)}
    assert qkv == "qkv"
    assert [view.as_dict() for view in (found.q, found.k, found.v)] == [
        {"offset": 0, "row": 32, "head": 4},
        {"offset": 16, "row": 32, "head": 4},
        {"offset": 24, "row": 32, "head": 4},
    ]
    assert {equation.result.name for equation in found.absorbed} == {
        "q0", "k0", "v0", "q1", "k1", "v1", "q2", "k2",
    }  # fmt: skip
    step = found.step({}, {"kc": "layers.0.k", "vc": "layers.0.v"})
    assert step.attrs["rotary"] == {"style": "half", "pairs": 2}
    assert (step.attrs["k_cache"], step.attrs["v_cache"]) == ("layers.0.k", "layers.0.v")
    assert (step.inputs["q"], step.inputs["cos"], step.outputs) == ("qkv", "cos", {"out": "y"})


def test_heads_that_hold_query_key_and_value_are_views_too() -> None:
    body = """
  %all: f16[T,4,8] = reshape(%qkv) {shape = ("T", 4, 8)}
  %q2: f16[T,4,4] = slice(%all) {axis = -1, start = 0, stop = 4}
  %pair: f16[T,2,16] = reshape(%qkv) {shape = ("T", 2, 16)}
  %k2: f16[T,2,4] = slice(%pair) {axis = -1, start = 4, stop = 8}
  %v1: f16[T,2,4] = slice(%pair) {axis = -1, start = 12, stop = 16}
CALL"""
    found = attention_steps(graph(body))["y"]
    assert found.q == View(found.q.value, 0, 32, 8)
    assert found.q.value.name == "qkv"
    # %pair is read twice: the engine makes it, and the kernel reads its result
    assert found.k == View(found.k.value, 4, 32, 16)
    assert found.v == View(found.k.value, 12, 32, 16)
    assert found.k.value.name == "pair"
    assert found.rotation is None


def test_a_rotation_that_something_else_reads_stays_in_the_engine() -> None:
    body = SLICES + TURNS + "CALL  %more: f16[T,2,4] = add(%k2, %k2)\n"
    source = graph(body)
    found = attention_steps(parse(str(source).replace("return y = %y", "return y = %y, more = %more")))["y"]
    assert found.rotation is None
    assert found.q.value.name == "q2"
    assert found.k.value.name == "k2"
    assert found.v.value.name == "qkv"


def test_keys_that_are_not_rotated_leave_both_to_the_engine() -> None:
    only_queries = TURNS.splitlines()[1] + "\n"
    found = attention_steps(graph(SLICES + only_queries + "CALL", k="k1"))["y"]
    assert found.rotation is None
    assert found.q.value.name == "q2"
    assert found.k.value.name == "qkv"


def test_equations_of_one_step_are_one_segment() -> None:
    source = graph(SLICES + TURNS + "CALL")
    found = attention_steps(source)["y"]
    owned = {equation.result.name for equation in (found.equation, *found.absorbed)}
    (segment,) = partition(source, lambda equation: "y" if equation.result.name in owned else None)
    assert segment.kind == "step"
    assert {value.name for value in segment.graph.inputs} == {value.name for value in source.inputs}
