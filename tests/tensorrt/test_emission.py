"""What a network says of the spec, its profiles, and how emission fails."""

from __future__ import annotations

from typing import Any

import pytest

from compiler.ir.parser import parse
from compiler.ir.types import Sym
from compiler.lower.tensorrt.dialects import dialect
from compiler.lower.tensorrt.network import add_profiles, create_network, emit, profiles
from tests.golden_errors import check_raises
from tests.tensorrt import recorder

SEGMENT = parse("""graph segment(%x: f16[T,8], %w: f16[6,8]) {
  dim T in 1..16..512
  %mlp.up: f16[T,6] = matmul(%x, %w) {transpose_b = true} @ specs/models/model.yaml:38:17
  %mlp.act: f16[T,6] = gelu(%mlp.up) {approximate = true} @ specs/models/model.yaml:38:17
  return out = %mlp.act
}
""")


def record(version: str) -> Any:
    trt, line = recorder.module(version), dialect(version)
    network = create_network(trt, trt.Builder(trt.Logger()), line)
    return trt, network, emit(trt, SEGMENT, network, line)


def test_layers_are_named_after_the_spec() -> None:
    _, network, emitter = record("10.3.0")
    names = [layer.name for layer in network._layers]
    assert names == ["mlp.up @ model.yaml:38", "mlp.act @ model.yaml:38"]
    assert str(emitter.places["mlp.up @ model.yaml:38"]) == "specs/models/model.yaml:38:17"


def test_the_first_version_spells_out_what_later_ones_have() -> None:
    _, network, _ = record("8.6.0")
    network.finish()
    names = [layer.name for layer in network._layers]
    assert names[0] == "mlp.up @ model.yaml:38"
    assert "mlp.act/tanh @ model.yaml:38" in names
    assert len(set(names)) == len(names)


def test_outputs_have_the_names_of_ports() -> None:
    _, network, _ = record("11.4.0")
    assert [tensor.name for tensor in network._outputs] == ["out"]


DIMS = (Sym("T", 1, 16, 512), Sym("B", 1, 1, 4), Sym("N", 1, 1, 512))


def test_decoding_has_a_profile_of_its_own() -> None:
    first, second = profiles(DIMS)
    assert first == (Sym("T", 1, 4, 64), Sym("B", 1, 1, 4), Sym("N", 1, 4, 64))
    assert second == (Sym("T", 65, 65, 512), Sym("B", 1, 1, 4), Sym("N", 1, 1, 512))
    chosen = profiles((Sym("T", 1, 2048, 8192), Sym("N", 1, 1, 8192)))
    assert [dims[0] for dims in chosen] == [Sym("T", 1, 1, 64), Sym("T", 65, 256, 512), Sym("T", 513, 2048, 8192)]
    assert [dims[1].hi for dims in chosen] == [64, 512, 8192]
    assert profiles((Sym("T", 1, 8, 64),)) == ((Sym("T", 1, 8, 64),),)


def test_profiles_state_the_shapes_of_inputs_that_have_any() -> None:
    trt = recorder.module("8.6.0")
    builder = trt.Builder(trt.Logger())
    config = builder.create_builder_config()
    add_profiles(builder, config, SEGMENT, profiles(DIMS))
    assert [profile._shapes for profile in config._profiles] == [
        {"x": ((1, 8), (4, 8), (64, 8))},
        {"x": ((65, 8), (65, 8), (512, 8))},
    ]


def test_types_that_a_version_lacks_are_named() -> None:
    trt, line = recorder.module("8.6.0"), dialect("8.6.0")
    graph = parse(
        "graph segment(%x: f32[T,8]) { dim T in 1..2..4 "
        '%y: bf16[T,8] = cast(%x) {dtype = "bf16"} @ specs/models/model.yaml:9:3\nreturn y = %y }'
    )
    check_raises("LOWER-031", emit, trt, graph, create_network(trt, trt.Builder(trt.Logger()), line), line)

    trt, line = recorder.module("8.6.0"), dialect("8.6.0")
    network = create_network(trt, trt.Builder(trt.Logger()), line)

    class Refusing:
        def __getattr__(self, name: str) -> Any:
            return (lambda *_: None) if name == "add_matrix_multiply" else getattr(network, name)

    check_raises("LOWER-032", emit, trt, SEGMENT, Refusing(), line)

    trt = recorder.module("8.6.0")
    network = create_network(trt, trt.Builder(trt.Logger()), dialect("8.6.0"))
    x = network.add_input("x", trt.DataType.FLOAT, (-1, 4))
    with pytest.raises(AttributeError, match="BF16"):
        _ = trt.DataType.BF16
    with pytest.raises(AttributeError, match="add_normalization_v2"):
        network.add_normalization_v2(x, x, x, 2)
    with pytest.raises(TypeError, match="add_cast"):
        network.add_cast(x)
    with pytest.raises(AttributeError, match="shapes"):
        x.shapes = 3
    half = network.add_cast(x, trt.DataType.HALF).get_output(0)
    with pytest.raises(AssertionError, match="SUM of HALF and FLOAT"):
        network.add_elementwise(half, x, trt.ElementWiseOperation.SUM)


def test_the_recorder_wants_every_type_said_in_the_weakly_typed_version() -> None:
    trt = recorder.module("8.6.0")
    network = create_network(trt, trt.Builder(trt.Logger()), dialect("8.6.0"))
    x = network.add_input("x", trt.DataType.FLOAT, (-1, 4))
    layer = network.add_activation(x, trt.ActivationType.RELU)
    layer.name = "relu"
    layer.get_output(0).name = "y"
    network.mark_output(layer.get_output(0))
    with pytest.raises(AssertionError, match="makes FLOAT, told None"):
        network.finish()
    layer.set_output_type(0, trt.DataType.FLOAT)
    with pytest.raises(AssertionError, match="computes"):
        network.finish()
    layer.precision = trt.DataType.FLOAT
    network.finish()
    strong = create_network(recorder.module("10.0.1"), recorder.module("10.0.1").Builder(None), dialect("10.0.1"))
    y = strong.add_input("x", trt.DataType.FLOAT, (-1, 4))
    with pytest.raises(AssertionError, match="strongly typed"):
        strong.add_activation(y, trt.ActivationType.RELU).set_output_type(0, trt.DataType.FLOAT)
