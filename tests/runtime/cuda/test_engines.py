"""How an engine is asked for its memory, contexts and shapes, in the names that each version of TensorRT has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from compiler.ir.parser import parse
from compiler.ir.types import Sym
from compiler.lower.tensorrt.dialects import dialect
from compiler.lower.tensorrt.network import add_profiles, create_network, emit
from tests.runtime.cuda import fake
from tests.tensorrt import recorder
from tests.tensorrt.recorder.api import api

TWICE = parse("graph segment(%x: f32[T,8]) { dim T in 1..4..9 %y: f32[T,8] = add(%x, %x) return y = %y }")
PROFILES = ((Sym("T", 1, 2, 3),), (Sym("T", 4, 4, 9),))


@pytest.mark.parametrize("version", recorder.VERSIONS)
def test_an_engine_of_every_version(version: str, trt_gpu: Callable[[str], Any]) -> None:
    trt = trt_gpu(version)
    from runtime.cuda.engines import Engine

    builder, line = trt.Builder(None), dialect(version)
    network, config = create_network(trt, builder, line), builder.create_builder_config()
    emitter = emit(trt, TWICE, network, line)
    add_profiles(builder, config, TWICE, PROFILES)
    device = fake.Device()
    engine = Engine(fake.Engine(api(version), network, config), device)
    assert (engine.memory, engine.dynamic) == (fake.SCRATCH, ("x",))
    addresses = {name: device.allocate(9 * 8 * 4) for name in ("x", "y")}
    for profile, rows in ((0, 2), (1, 9), (0, 3), (0, 3)):
        x = np.random.default_rng(rows).standard_normal((rows, 8)).astype(np.float32)
        device.upload(addresses["x"], x)
        engine.enqueue(profile, None, device.allocate(engine.memory), addresses, {"x": x.shape})
        got = np.zeros_like(x)
        device.download(got, addresses["y"])
        device.wait()
        np.testing.assert_array_equal(got, 2 * x)
    with pytest.raises(AssertionError, match="refuses"):
        engine.enqueue(0, None, 4096, addresses, {"x": (4, 8)})
    engine.close()
    del emitter
