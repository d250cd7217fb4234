"""A model in stages on emulated GPUs: as on one, whatever is on its way between the stages."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from compiler.api import compile_with, prepare, weights_of
from compiler.validate.reference import random_rows
from runtime.bundle import Bundle
from runtime.executable import LIKELIEST, Ahead
from runtime.program import Port, Program, stage_of
from specs.errors import SpecRTError
from tests.precision.models import MODELS
from tests.runtime.cuda import emulated

LENGTHS = (1, 5, 9)


class Device(emulated.Device):
    """One that does what is in its stream now and then: a stage may be far in front of another, as events allow."""

    chance = random.Random(5)

    def later(self, work: Callable[[], None]) -> None:
        self.queue.append(work)
        for _ in range(self.chance.choice((0, 0, 0, 1, 9))):
            if self.queue:
                self.queue.pop(0)()


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch, gpu: None) -> None:  # noqa: ARG001
    """GPUs that may be in front of each other."""
    executable, pipeline = (importlib.import_module(f"runtime.cuda.{name}") for name in ("executable", "pipeline"))
    monkeypatch.setattr(executable, "Device", Device)
    monkeypatch.setattr(pipeline, "count", lambda: 3)


def compiled(folder: Path, spec: str, precision: str, stages: int) -> Path:
    """A bundle of a tiny model in so many stages."""
    prepared = prepare(
        MODELS / f"{spec}.yaml", size="tiny", weights="random", max_sequence=64, max_batch=3, precision=precision,
        target="sm90", toolchain="tensorrt-8.6", pipeline_parallel=stages, out=folder / f"stages-{stages}",
    )  # fmt: skip
    return compile_with(prepared, weights_of(prepared))


@pytest.mark.usefixtures("devices")
def test_stages_do_what_one_gpu_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = runtime.load(compiled(tmp_path, "llama", "fp32", 1), step_tokens=4)
    several = runtime.load(compiled(tmp_path, "llama", "fp32", 3), step_tokens=4)
    executable: Any = several.executable
    assert isinstance(executable, Ahead)
    assert (executable.stages, len(executable.devices)) == (3, 3)
    # each GPU has its share of the cache and of the weights
    assert (executable.blocks, executable.cache_bytes) == (one.executable.blocks, one.executable.cache_bytes)
    held = [device.used for device in executable.devices]
    assert max(held) < 0.7 * one.executable.devices[0].used  # type: ignore[attr-defined]
    rows = random_rows(several.vocab, LENGTHS)
    for found, expected in zip(several.logits(rows), one.logits(rows), strict=True):
        assert np.array_equal(found, expected)

    launch, launched = executable.launch, []

    def recorded(batch: Any, sources: Any = (), how: Any = LIKELIEST, behind: int = 1) -> int:
        batch["tokens"][[place for place, source in enumerate(sources) if source >= 0]] = -1  # nobody may read them
        launched.append((len(batch["past_lens"]), behind, max(sources, default=-1) >= 0))
        return int(launch(batch, sources, how, behind))

    monkeypatch.setattr(executable, "launch", recorded)
    made = several.generate(rows, max_new_tokens=4, stop=())
    assert made == one.generate(rows, max_new_tokens=4, stop=())
    assert made[2:] == several.generate(rows[2:], max_new_tokens=4, stop=())
    assert (1, 3, True) in launched  # one sequence in each stage
    drawn, searched = (
        [model.generate(rows[:2], max_new_tokens=2, stop=(), temperature=0.9, seed=3) for model in (one, several)],
        [model.search(rows[1:2], num_beams=2, max_new_tokens=3, stop=()) for model in (one, several)],
    )
    assert drawn[0] == drawn[1]
    assert searched[0][0][0].ids == searched[1][0][0].ids
    several.engine.submit(rows[1], max_new_tokens=9)
    several.engine.step()
    several.close()
    assert not any(device.queue for device in executable.devices)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("eager", [0, 1])
def test_what_arrives_stays_until_it_is_taken_out(eager: int) -> None:
    """One GPU does all of its steps before the other does any, as far as the other lets it."""
    from runtime.cuda.pipeline import _Inbox

    first, second = emulated.Device(), emulated.Device()
    program = Program((), (), {}, (), {}, None, {"x": Port("x", "i32", ("T", 2))}, received=("x",))
    inbox = _Inbox(program, {"T": 8}, first, second)  # type: ignore[arg-type]
    source, target = ({"x": device.allocate(64)} for device in (first, second))
    given = [np.full((1 + number % 3, 2), number, np.int32) for number in range(7)]
    found = [np.zeros_like(array) for array in given]
    for number, (array, result) in enumerate(zip(given, found, strict=True)):
        first.upload(source["x"], array)
        inbox.send(number, source, {"T": len(array)})
        inbox.receive(number, target, {"T": len(array)})
        second.download(result, target["x"])
    for device in (first, second)[:: -1 if eager else 1]:
        device.wait()
    for array, result in zip(given, found, strict=True):
        assert np.array_equal(array, result)


@pytest.mark.usefixtures("devices")
def test_an_encoder_in_stages(tmp_path: Path) -> None:
    one, several = (runtime.load(compiled(tmp_path, "bert", "fp32", stages)) for stages in (1, 2))
    rows = random_rows(one.vocab, LENGTHS)
    for found, expected in zip(several.forward(rows), one.forward(rows), strict=True):
        for name, array in expected.items():
            assert np.array_equal(found[name], array)


@pytest.mark.usefixtures("devices")
def test_a_stage_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error is told, and the others are given back; they agree on the least cache."""
    from runtime.cuda import executable
    from runtime.cuda.pipeline import Pipeline

    bundle = Bundle.open(compiled(tmp_path, "llama", "fp32", 2))
    closed: list[int] = []

    class Device(emulated.Device):
        taken = 0  # of the second GPU's memory, by others

        @property
        def free_memory(self) -> int:
            return super().free_memory - self.ordinal * self.taken

        def close(self, *_: Any) -> None:
            closed.append(self.ordinal)

    monkeypatch.setattr(executable, "Device", Device)
    several = Pipeline(bundle, devices=(0, 1), tokens=32, graphs=False)
    assert several.blocks == 6
    left = several.devices[1].free_memory
    several.close()
    assert closed == [0, 1]
    own = stage_of(bundle.program, 1).cache
    assert own is not None
    monkeypatch.setattr(Device, "taken", left + 3 * own.block_bytes)
    several = Pipeline(bundle, devices=(0, 1), tokens=32, graphs=False)
    assert 2 <= several.blocks < 6
    several.close()
    closed.clear()
    with pytest.raises(SpecRTError, match="RUN-044"):
        Pipeline(bundle, devices=(2, 3), tokens=32)
    with pytest.raises(SpecRTError, match="RUN-011"):
        Pipeline(bundle, devices=(0, 1), tokens=32, cache_tokens=64 * 3, graphs=False)
    assert sorted(closed) == [0, 1]
