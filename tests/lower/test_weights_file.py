"""Weights on the disk: read by safetensors, in files of a bounded size, what weights decide computed once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from compiler.ir.parser import parse
from compiler.ir.types import TensorType
from compiler.lower.stored_weights import Tensor, store
from compiler.lower.weights_file import write_weights

WEIGHTS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.ones(2, 4),
    "gain": torch.tensor([1.0, 2.0, 3.0, 4.0]),
}


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "i32", "bool"])
def test_safetensors_reads_what_is_written(dtype: str, tmp_path: Path) -> None:
    tensors = [Tensor(name, TensorType(dtype, tuple(value.shape))) for name, value in WEIGHTS.items()]
    seen: list[tuple[str, int, int]] = []
    stored = write_weights(tensors, WEIGHTS.__getitem__, tmp_path, lambda *event: seen.append(event))
    assert {item.file for item in stored.values()} == {"weights-00001-of-00001.safetensors"}
    loaded = load_file(tmp_path / "weights-00001-of-00001.safetensors")
    assert list(loaded) == sorted(WEIGHTS)
    for tensor in tensors:
        assert torch.equal(loaded[tensor.name], tensor.make(WEIGHTS.__getitem__))
    assert seen == [("weights", 0, 3), ("weights", 1, 3), ("weights", 2, 3)]


def test_files_are_bounded_and_a_larger_tensor_lies_alone(tmp_path: Path) -> None:
    tensors = [Tensor(name, TensorType("f32", tuple(value.shape))) for name, value in WEIGHTS.items()]
    stored = write_weights(tensors, WEIGHTS.__getitem__, tmp_path, shard=40)
    assert [stored[name].file for name in ("a", "b", "gain")] == [
        f"weights-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    for name, item in stored.items():
        with safe_open(tmp_path / item.file, "pt") as file:
            assert torch.equal(file.get_tensor(name), WEIGHTS[name])


GRAPH = parse("""graph g(%x: f32[T,4]) {
  dim T in 1..2..8
  %a: f32[3,4] = weight() {name = "a"}
  %b: f32[2,4] = weight() {name = "b"}
  %joined: f32[5,4] = concat(%a, %b) {axis = -2}
  %gain: f32[4] = weight() {name = "gain"}
  %one: f32[4] = add(%gain, 1.0)
  %y: f32[T,5] = matmul(%x, %joined) {transpose_b = true}
  %z: f32[T,4] = mul(%x, %one)
  %bare: f32[T,4] = add(%z, %gain)
  return y = %y, z = %bare
}
""")


def test_what_weights_decide_is_stored_computed() -> None:
    graph, tensors = store(GRAPH)
    assert list(tensors) == ["joined", "gain", "one"]
    assert [equation.op for equation in graph.equations] == ["weight", "weight", "weight", "matmul", "mul", "add"]
    assert torch.equal(tensors["joined"].make(WEIGHTS.__getitem__), torch.cat((WEIGHTS["a"], WEIGHTS["b"])))
    assert torch.equal(tensors["one"].make(WEIGHTS.__getitem__), WEIGHTS["gain"] + 1)
