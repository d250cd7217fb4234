"""What a GPU can lack, each with its golden text; no GPU is needed to say it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime import load
from runtime.bundle import Bundle
from runtime.cuda.budget import Needs, plan_memory
from runtime.cuda.missing import (
    cuda_failed,
    damaged_kernels,
    nccl_failed,
    no_kernels,
    no_nccl,
    not_built,
    other_weights,
    tag,
    unreadable,
    usable,
)  # fmt: skip
from runtime.program import CacheLayer, CacheLayout, Step
from specs.errors import SpecRTError
from tests.golden_errors import check_golden, check_raises
from tests.runtime.fake import bundle

LAYOUT = CacheLayout(64, (CacheLayer("k", "v", 32, 128, 128, "f16"),) * 32)  # 32 MiB a block
OPTIONS = {"max_batch": 64, "max_sequence": 4096, "cache_tokens": None, "tokens": 2048}
GB = 10**9


def test_memory_is_divided_before_any_is_taken() -> None:
    needs = Needs(weights=13 * GB, arena=1 * GB, engines=GB // 2, batch=10**6)
    size = plan_memory(needs, LAYOUT, 80 * GB, **OPTIONS)
    assert size is not None
    assert size.bytes <= 0.92 * (80 * GB - needs.total) < size.bytes + size.block_bytes
    assert plan_memory(needs, None, 80 * GB, **OPTIONS) is None


def test_too_little_memory() -> None:
    weights = Needs(weights=138 * GB, arena=1 * GB, engines=GB // 2, batch=10**6)
    values = Needs(weights=1 * GB, arena=30 * GB, engines=GB // 2, batch=10**6)
    check_raises("RUN-040", plan_memory, weights, LAYOUT, 80 * GB, **OPTIONS)
    check_raises("RUN-040-values", plan_memory, values, LAYOUT, 24 * GB, **OPTIONS)
    check_raises("RUN-011-gpu", plan_memory, weights, LAYOUT, 140 * GB, **OPTIONS)


def test_engines_of_another_machine(tmp_path: Path) -> None:
    here = tag("8.6.0", "NVIDIA H200")
    assert here == "tensorrt-8.6.0-NVIDIA_H200"
    check_golden("BUNDLE-020", not_built(tmp_path / "bundle", here))
    (tmp_path / "bundle" / "engines" / tag("10.8.0.43", "NVIDIA A100-SXM4")).mkdir(parents=True)
    check_golden("BUNDLE-020-other", not_built(tmp_path / "bundle", here))
    check_golden("BUNDLE-021", unreadable(tmp_path / "bundle", Path("engines/abc.plan"), "8.6.0"))


def test_kernels_of_another_gpu(tmp_path: Path) -> None:
    check_golden("BUNDLE-022", no_kernels(tmp_path / "bundle", 90, [80, 86]))


def test_what_is_broken() -> None:
    check_golden("BUNDLE-023", other_weights(Path("weights-00001-of-00001.safetensors"), "head.weight"))
    check_golden("BUNDLE-024", damaged_kernels(Path("kernels/kernels.json"), "KeyError('sets')"))
    check_golden("RUN-041", cuda_failed("CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"))


def test_several_gpus_without_what_they_exchange_values_by(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.cuda import communicator

    monkeypatch.setattr(communicator, "LIBRARY", "libnone.so.0")
    check_raises("RUN-045", communicator.new_id)
    check_golden("RUN-045-reason", no_nccl("libnccl.so.2: file too short"))
    more = "ncclInternalError: Internal check failed.\nLast error:\nSocket recv failed"
    check_golden("RUN-046", nccl_failed("ncclCommInitRank", "internal error", more))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("found", [{}, {"format": 1}])
def test_kernels_of_another_format(found: dict[str, Any], tmp_path: Path) -> None:
    """They would take a number for an address, or not do what others leave to them."""
    from compiler.kernels import library
    from runtime.cuda.kernels import FILE, FORMAT, Kernels

    assert library.FORMAT == FORMAT
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_text(json.dumps({"architectures": [90], **found}))
    with pytest.raises(SpecRTError, match="BUNDLE-024") as caught:
        Kernels(tmp_path, SimpleNamespace(capability=90), needed=True)
    check_golden(f"BUNDLE-024-format-{found.get('format', 0)}", caught.value)


@pytest.mark.parametrize(
    ("gpu", "compiled", "expected"), [(90, [80, 90], 90), (89, [80, 86, 90], 86), (90, [80], None), (80, [86], None)]
)
def test_machine_code_runs_upwards_within_a_generation(gpu: int, compiled: list[int], expected: int | None) -> None:
    assert usable(gpu, compiled) == expected


def test_a_bundle_for_a_gpu_on_a_machine_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)  # as where it is not installed, whether it is here or not
    for name in ("driver", "kernels", "engines", "steps", "executable"):
        monkeypatch.delitem(sys.modules, f"runtime.cuda.{name}", raising=False)
    step = Step("engine", "tensorrt", "segments/a.ir", {}, {}, {})
    here = bundle("decoder")
    program = replace(here.program, steps=(step,), dims={"T": (1, 2048, 8192)})
    monkeypatch.setattr(Bundle, "open", lambda *_, **__: replace(here, program=program))
    check_raises("RUN-042", load, tmp_path)
    check_raises("RUN-013-gpu", load, tmp_path, step_tokens=10_000)
