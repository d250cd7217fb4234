"""A bundle with `attention: native`, built, loaded and served; the GPU and its TensorRT are fakes (fake.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compiler
import runtime
from compiler.lower.tensorrt import plans
from tests.golden_errors import ROOT
from tests.runtime.cuda import fake

DEPLOYMENT = """\
deployment: 1
checkpoint: {demo}
target: sm90
toolchain: {toolchain}
build: {{attention: native, weights: {weights}}}
limits: {{max_batch: 3, max_sequence: 64}}
"""
PROMPTS = ([5, 9, 200, 31, 7, 8, 9, 10, 11], [3], [17, 80, 2, 300], [1, 2, 3, 4, 5, 6])


@pytest.fixture(params=[("tensorrt-10.16", "10.16.1", "inputs"), ("tensorrt-11.4", "11.4.0", "baked")], ids=str)
def bundle(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trt_gpu: Callable[[str], Any]
) -> Iterator[Path]:
    toolchain, version, weights = request.param
    monkeypatch.setattr(plans, "installed", lambda: None)
    monkeypatch.setenv("SPECRT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "deployment.yaml"
    text = DEPLOYMENT.format(demo=ROOT / "demo" / "tiny-llama", toolchain=toolchain, weights=weights)
    path.write_text(text, encoding="utf-8")
    out = compiler.compile(path, out=tmp_path / "bundle")
    plans.build_bundle(out, trt=trt_gpu(version), gpu=fake.Device.name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield out
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[runtime.Model]:
    out = tmp_path_factory.mktemp("cpu") / "bundle"
    with runtime.load(compiler.compile(ROOT / "demo" / "tiny-llama", out=out, max_sequence=64)) as model:
        yield model


def test_as_on_the_cpu(bundle: Path, cpu: runtime.Model) -> None:
    with runtime.load(bundle, step_tokens=4) as model:
        assert list(model.executable._graphs) == [1, 2, 3]
        assert model.generate(PROMPTS, max_new_tokens=6, stop=()) == cpu.generate(PROMPTS, max_new_tokens=6, stop=())
        how: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "stop": ()}
        for mine, theirs in zip(model.search(PROMPTS[:2], **how), cpu.search(PROMPTS[:2], **how), strict=True):
            assert [beam.ids for beam in mine] == [beam.ids for beam in theirs]
            np.testing.assert_allclose([one.score for one in mine], [one.score for one in theirs], atol=4e-4)
        drawn = {"max_new_tokens": 5, "stop": (), "temperature": 0.8, "seed": 3}
        assert model.generate(PROMPTS[:2], **drawn) == cpu.generate(PROMPTS[:2], **drawn)
        for got, expected in zip(model.logits(PROMPTS), cpu.logits(PROMPTS), strict=True):
            # float32 engines: sums in another order, each of a hundred terms and through six layers
            np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
        assert model.executable.blocks == 3
        assert model.engine.preemptions == 0
        gpu = fake.Device.here  # every decode call is a graph: put into the stream when it was made, and never after
        assert [shape for shape in gpu.started if shape[1] == 1] == [(size, 1) for size in (1, 2, 3) for _ in range(2)]
        assert gpu.replayed > 12


def test_slots_are_what_memory_allows(bundle: Path, cpu: runtime.Model) -> None:
    with runtime.load(bundle, cache_tokens=130) as model:
        assert model.executable.blocks == 2  # of 128 places
        assert model.executable.cache_bytes == 2 * 6 * 2 * 4 * 128 * 32 * 4
        assert model.generate(PROMPTS, max_new_tokens=3, stop=()) == cpu.generate(PROMPTS, max_new_tokens=3, stop=())
