"""The GPU runtime on a real GPU, against the same model on the CPU; bench/gpu.py does more, without PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import compiler
import runtime
from compiler.validate.metrics import agreement
from specs.precision import load_caches
from tests.golden_errors import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]
LENGTHS = (1, 7, 40, 130, 300)
NEW = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[runtime.Model, runtime.Model]]:
    """demo/tiny-llama in float32, on the CPU and on the first GPU."""
    from compiler.lower.tensorrt.plans import build_bundle
    from runtime.cuda.driver import Device

    device = Device()
    target = f"sm{device.capability}"
    device.close()
    folder = tmp_path_factory.mktemp("bundles")
    paths: list[Path] = [
        compiler.compile(ROOT / "demo" / "tiny-llama", target=to, precision="fp32", out=folder / to, max_sequence=512)
        for to in ("cpu", target)
    ]
    build_bundle(paths[1])
    with runtime.load(paths[0]) as cpu, runtime.load(paths[1]) as gpu:
        yield cpu, gpu


def prompts(vocab: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, vocab, length).tolist() for length in LENGTHS]


def test_logits(models: tuple[runtime.Model, runtime.Model]) -> None:
    cpu, gpu = models
    rows = prompts(cpu.vocab)
    for expected, got in zip(cpu.logits(rows), gpu.logits(rows), strict=True):
        assert np.abs(got - expected).max() <= 1e-3  # float32 engines: issue 4's bound; 1e-4 was seen on an H200


def test_ids_in_any_company(models: tuple[runtime.Model, runtime.Model]) -> None:
    """Alone, together, and arriving while others run: graphs of several sizes, prompts beside decoding."""
    cpu, gpu = models
    rows = prompts(cpu.vocab)
    expected = cpu.generate(rows, max_new_tokens=NEW, stop=())
    assert gpu.generate(rows, max_new_tokens=NEW, stop=()) == expected
    assert [gpu.generate([row], max_new_tokens=NEW, stop=())[0] for row in rows] == expected
    requests = []
    for number in range(20):
        requests.append(gpu.engine.submit(rows[number % len(rows)], max_new_tokens=NEW))
        for _ in range(number % 3):
            gpu.engine.step()
    while gpu.engine.busy:
        gpu.engine.step()
    assert [request.new for request in requests] == [expected[number % len(rows)] for number in range(20)]


def test_closing_gives_back_memory(models: tuple[runtime.Model, runtime.Model]) -> None:
    from runtime.cuda.driver import Device

    path = models[1].bundle.path
    device = Device()
    runtime.load(path, cache_tokens=512).close()  # loads what the driver keeps
    before = device.free_memory
    for _ in range(3):
        runtime.load(path, cache_tokens=512).close()
    assert device.free_memory >= before
    device.close()


def test_a_decoder_in_one_engine(models: tuple[runtime.Model, runtime.Model], tmp_path: Path) -> None:
    """`attention: native`, where the TensorRT that is here has the layers."""
    import tensorrt

    from compiler.lower.tensorrt.dialects import dialect
    from compiler.lower.tensorrt.plans import build_bundle

    line = dialect(tensorrt.__version__)
    if line.attention is None:
        pytest.skip(f"TensorRT {tensorrt.__version__} has no attention of its own")
    cpu, gpu = models
    deployment = tmp_path / "deployment.yaml"
    deployment.write_text(
        f"deployment: 1\ncheckpoint: {ROOT / 'demo' / 'tiny-llama'}\ntarget: {gpu.bundle.manifest['target']}\n"
        f"toolchain: {line.toolchain}\nbuild: {{attention: native}}\nlimits: {{max_batch: 8, max_sequence: 512}}\n"
    )
    out = compiler.compile(deployment, out=tmp_path / "native")
    build_bundle(out)
    rows = prompts(cpu.vocab)
    with runtime.load(out, step_tokens=64) as native:
        for expected, got in zip(cpu.logits(rows), native.logits(rows), strict=True):
            assert np.abs(got - expected).max() <= 1e-3
        assert native.generate(rows, max_new_tokens=NEW, stop=()) == cpu.generate(rows, max_new_tokens=NEW, stop=())


@pytest.mark.parametrize("cache", ["int8", "fp8"])
def test_a_cache_of_codes(cache: str, models: tuple[runtime.Model, runtime.Model], tmp_path: Path) -> None:
    """Logits within the cache's bound of float32's; ids of each alone: together, in pieces, and with little cache."""
    from compiler.lower.tensorrt.plans import build_bundle

    cpu, gpu = models
    options = {"precision": "fp32", "kv_cache": cache, "max_sequence": 512}
    target = gpu.bundle.manifest["target"]
    out = compiler.compile(ROOT / "demo" / "tiny-llama", target=target, out=tmp_path / cache, **options)
    build_bundle(out)
    rows = prompts(cpu.vocab)
    with runtime.load(out) as coded:
        found = agreement(coded.logits(rows), cpu.logits(rows))
        assert found.relative <= 2 * load_caches()[cache].bound.relative, found  # random ids, no text
        alone = [coded.generate([row], max_new_tokens=NEW, stop=())[0] for row in rows]
        assert coded.generate(rows, max_new_tokens=NEW, stop=()) == alone
    with runtime.load(out, step_tokens=64, cache_tokens=544) as small:
        assert small.generate(rows, max_new_tokens=NEW, stop=()) == alone


@pytest.mark.parametrize("way", ["pipeline", "tensor"])
def test_two_gpus(way: str, models: tuple[runtime.Model, runtime.Model], tmp_path: Path) -> None:
    """Stages on a GPU each, or products that both share: ids of each alone, in pieces and together."""
    from compiler.lower.tensorrt.plans import build_bundle
    from runtime.cuda.driver import count

    if count() < 2:
        pytest.skip("one GPU")
    cpu, gpu = models
    target = gpu.bundle.manifest["target"]
    options = {"precision": "fp32", "max_sequence": 512, f"{way}_parallel": 2}
    out = compiler.compile(ROOT / "demo" / "tiny-llama", target=target, out=tmp_path / way, **options)
    build_bundle(out)
    rows = prompts(cpu.vocab)
    with runtime.load(out, step_tokens=64) as both:
        assert both.generate(rows, max_new_tokens=NEW, stop=()) == cpu.generate(rows, max_new_tokens=NEW, stop=())
