"""A bundle over several GPUs, which are emulated: collectives, agreement, and all that the engine asks of ranks."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import runtime
from compiler.api import compile_with, prepare, weights_of
from compiler.validate.metrics import agreement
from compiler.validate.reference import outputs, random_rows
from runtime.bundle import Bundle
from runtime.program import Port, Program, Step
from specs.errors import SpecRTError
from specs.precision import load_recipe
from tests.golden_errors import check_raises
from tests.passes.test_split_tensors import TOLERANCE
from tests.precision.models import MODELS, quantized_graph
from tests.runtime import fake
from tests.runtime.cuda.emulated import Device
from tests.runtime.cuda.ranks import Communicator, Exchange, Worker

ROWS = [[5], [3, 1, 4]]


def on_ranks(count: int, work: Callable[[int, Device, Communicator], Any]) -> list[Any]:
    """What a function gives on each rank, in threads."""
    exchange = Exchange(count)
    found: list[Any] = [None] * count

    def run(rank: int) -> None:
        device = Device(rank)
        found[rank] = work(rank, device, Communicator(device, exchange, rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def step_of(name: str, width: int, ranks: int) -> Program:
    outs = width * ranks if name == "all_gather" else width
    step = Step("collective", "nccl", "", {"x": "a"}, {"out": "b"}, {}, name, {"axis": -1})
    types = {"a": Port("a", "f32", ("N", width)), "b": Port("b", "f32", ("N", outs))}
    return Program((), (), {"b": "b"}, (step,), {"N": (1, 4, 9)}, None, types)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", ["all_reduce", "all_gather"])
@pytest.mark.parametrize("rows", [1, 7])
def test_collective_steps(name: str, rows: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of all ranks, side by side or added up; where they do not fit, some rows at a time."""
    from runtime.cuda.steps import Call

    collectives: Any = importlib.import_module("runtime.cuda.collectives")

    width = 6
    program = step_of(name, width, ranks)
    monkeypatch.setattr(collectives, "GATHERED", 3 * width * ranks * 4)
    given = np.random.default_rng(0).standard_normal((ranks, rows, width)).astype(np.float32)

    def work(rank: int, device: Device, group: Communicator) -> Any:
        places = [device.allocate(4 * rows * width * ranks) for _ in range(2)]
        scratch = device.allocate(collectives.gather_bytes(program, ranks, {"N": rows}))
        step = collectives.collective_step(program, program.steps[0], group, device, scratch)
        device.upload(places[0], given[rank])
        step(Call({"N": rows}, dict(zip("ab", places, strict=True)), 0, None, 0, 0, 0))
        found = np.zeros((rows, width * (ranks if name == "all_gather" else 1)), np.float32)
        device.download(found, places[1])
        device.wait()
        return found, group.calls

    wanted = np.concatenate(list(given), axis=1) if name == "all_gather" else np.add.reduce(given)
    for found, calls in on_ranks(ranks, work):
        assert np.array_equal(found, wanted)
        assert len(calls) == (3 if (name, rows) == ("all_gather", 7) else 1)


@pytest.mark.usefixtures("gpu")
def test_what_ranks_agree_on() -> None:
    from runtime.cuda.collectives import Agreement

    def work(rank: int, device: Device, group: Communicator) -> Any:
        agreement = Agreement(group, device)  # type: ignore[arg-type]
        return agreement.least(100 - rank), agreement.total({"a": 1.0 + rank, "b": 2.0})

    assert on_ranks(3, work) == [(98, {"a": 6.0, "b": 6.0})] * 3


def bundle_of(folder: Path, ranks: int) -> Path:
    """A tiny model whose ranks all compute everything: what is between ranks is tested, not how work is divided."""
    prepared = prepare(
        MODELS / "llama.yaml", size="tiny", weights="random", max_sequence=32, max_batch=2, precision="bf16",
        target="sm90", toolchain="tensorrt-8.6", out=folder / "bundle",
    )  # fmt: skip
    path = Path(compile_with(prepared, weights_of(prepared)))
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["parallel"]["tensor"] = ranks
    for rank in range(1, ranks):
        name = f"plan-{rank}.json"
        (path / name).write_bytes((path / "plan.json").read_bytes())
        manifest["files"][name] = manifest["files"]["plan.json"]
    (path / "bundle.json").write_text(json.dumps(manifest))
    return path


def test_all_that_the_engine_asks_for(tmp_path: Path, gpus: list[Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that are likeliest or drawn, steps ahead, beams; all ranks are told, and end."""
    from runtime.cuda.executable import CUDAExecutable

    asked: list[tuple[int, str]] = []
    for name in ("execute", "launch", "copy_blocks"):
        plain = getattr(CUDAExecutable, name)

        def told(self: Any, *given: Any, name: str = name, plain: Any = plain, **options: Any) -> Any:
            asked.append((self.device.ordinal, name))
            return plain(self, *given, **options)

        monkeypatch.setattr(CUDAExecutable, name, told)
    path = bundle_of(tmp_path, 2)
    results = []
    for devices in ([0, 1], None):
        if devices is None:
            manifest = json.loads((path / "bundle.json").read_text())
            manifest["parallel"]["tensor"] = 1
            (path / "bundle.json").write_text(json.dumps(manifest))
        with runtime.load(path, devices=devices) as model:
            found = (
                model.generate(ROWS, max_new_tokens=3, stop=()),
                model.generate(ROWS, max_new_tokens=2, stop=(), temperature=0.9, seed=3),
                [(one.ids, one.score) for one in model.search(ROWS[1:], max_new_tokens=2, stop=(), num_beams=2)[0]],
            )
            results.append((found, model.executable.blocks, model.executable.cache_bytes))
        model.close()  # a second time does nothing
        if devices is not None:
            assert len(gpus) == 1
            assert not gpus[0].is_alive()
            assert [name for rank, name in asked if rank == 0] == [name for rank, name in asked if rank == 1]
            assert {name for _, name in asked} == {"execute", "launch", "copy_blocks"}
    (several, blocks, size), (one, blocks_of_one, size_of_one) = results
    assert (blocks, size) == (blocks_of_one, 2 * size_of_one)
    assert several == one


def test_stages_whose_products_are_shared(tmp_path: Path, gpus: list[Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with two GPUs each: the first rank's are the first of each stage. A stage exchanges on its own."""
    from runtime.cuda.executable import CUDAExecutable

    started: list[tuple[bool, int, int]] = []
    run, here = CUDAExecutable._run, threading.get_ident()

    def told(self: Any, *given: Any) -> Any:
        if self._group is not None:
            started.append((threading.get_ident() != here, self.device.ordinal, self._group.size))
        return run(self, *given)

    monkeypatch.setattr(CUDAExecutable, "_run", told)
    results = []
    for ranks, stages, devices in ((1, 1, None), (2, 2, [4, 5, 6, 7])):
        prepared = prepare(
            MODELS / "llama.yaml", size="tiny", weights="random", max_sequence=32, max_batch=2, precision="fp32",
            target="sm90", toolchain="tensorrt-8.6", tensor_parallel=ranks, pipeline_parallel=stages,
            out=tmp_path / f"{ranks}-{stages}",
        )  # fmt: skip
        with runtime.load(compile_with(prepared, weights_of(prepared)), devices=devices) as model:
            executable: Any = model.executable
            results.append(
                (model.logits(ROWS), model.generate(ROWS, max_new_tokens=4, stop=()), executable.cache_bytes)
            )
    assert executable.stages == 2
    assert not gpus[0].is_alive()
    (logits, ids, size), (found, found_ids, found_size) = results
    for one, several in zip(logits, found, strict=True):
        assert np.abs(several - one).max() <= TOLERANCE * np.abs(one).max()
    assert (found_ids, found_size) == (ids, size)  # keys and values are shared, not copied
    steps = len(started) // 4
    assert sorted(started) == sorted([(False, 4, 2), (False, 6, 2), (True, 5, 2), (True, 7, 2)] * steps)


class Executable:
    """In place of a rank's: all ranks meet in each step, and any of them may fail."""

    block_size, blocks, cache_bytes = 4, 8, 100
    fails: Callable[[str, int], None] = staticmethod(lambda *_: None)

    def __init__(self, bundle: Any, *, device: int, connect: Callable[[Any], Any], **_: int) -> None:
        self.device, self.rank, self.bundle = Device(device), device, bundle
        self.group: Any = connect(self.device, SimpleNamespace(others={}))
        self.address = self.device.allocate(256)
        try:
            self.step("load")
        except BaseException:
            self.group.abort()
            raise

    def step(self, name: str) -> None:
        self.fails(name, self.rank)
        self.group.all_reduce(self.address, self.address, 1, "i32")
        self.device.wait()

    def execute(self, batch: Any) -> Any:
        self.step("execute")
        return batch

    def close(self) -> None:
        self.device.wait()
        self.group.close()


Fails = Callable[[str, int], None]


@pytest.fixture
def load(gpus: list[Worker], monkeypatch: pytest.MonkeyPatch) -> Callable[[Fails], Any]:  # noqa: ARG001
    """Two ranks of that; what is given may raise, in a step of a name, on a rank."""
    ranks: Any = sys.modules["runtime.cuda.ranks"]
    bundle = SimpleNamespace(path=Path(), tensor=2, pipeline=1, name="x", of_rank=lambda rank: rank)
    monkeypatch.setattr(ranks, "CUDAExecutable", Executable)
    monkeypatch.setattr(ranks.Bundle, "open", lambda *_, **__: bundle)

    def load(fails: Fails) -> Any:
        monkeypatch.setattr(Executable, "fails", staticmethod(fails))
        return ranks.RankedExecutable(bundle, tokens=1, cache_tokens=None, devices=(3, 5))

    return load


def on(name: str, rank: int, error: BaseException) -> Fails:
    def fails(step: str, here: int) -> None:
        if (step, here) == (name, rank):
            raise error

    return fails


def test_a_rank_that_fails_in_a_step(load: Callable[[Fails], Any], gpus: list[Worker]) -> None:
    """The others go on, and what is raised is what it said, from then on."""
    executable = load(on("execute", 5, ValueError("out of luck")))
    for _ in range(2):
        check_raises("RUN-047", executable.execute, {})
    executable.close()
    assert gpus[0].killed
    assert not gpus[0].is_alive()


@pytest.mark.parametrize("rank", [3, 5])
def test_a_rank_that_fails_while_loading(rank: int, load: Callable[[Fails], Any], gpus: list[Worker]) -> None:
    with pytest.raises(SpecRTError) as caught:
        load(on("load", rank, SpecRTError("RUN-040", "too small", hint="a larger one")))
    where = "" if rank == 3 else "rank 1 on GPU 5: "
    assert str(caught.value) == f"error[RUN-040]: {where}too small\nhint: a larger one"
    assert not gpus[0].is_alive()


def test_a_rank_that_ends(load: Callable[[Fails], Any], gpus: list[Worker]) -> None:
    executable = load(lambda *_: None)
    gpus[0].kill()
    check_raises("RUN-047-ended", executable.execute, {})
    executable.close()


def test_an_interrupt_of_the_first_rank(load: Callable[[Fails], Any], gpus: list[Worker]) -> None:
    """The others may have done the step or not: nothing can be run any more."""
    executable = load(on("execute", 3, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        executable.execute({})
    check_raises("RUN-048", executable.execute, {})
    executable.close()
    executable.close()  # a second time does nothing
    assert not gpus[0].is_alive()


# Key and value heads that are fewer than the ranks. SPECRT_ALL_PAIRS=1: experts, latent attention, codes, four ranks.
PAIRS = [("gemma", "bf16", 2)]
OTHERS = [("mixtral", "bf16", 2), ("deepseek_v2", "bf16", 2), ("gpt_neox", "w8a16", 2), ("chatglm2", "bf16", 4)]


@pytest.mark.parametrize(
    ("spec", "precision", "ranks"), PAIRS + OTHERS if os.environ.get("SPECRT_ALL_PAIRS") else PAIRS
)
@pytest.mark.usefixtures("gpus")
def test_a_model_that_ranks_share(spec: str, precision: str, ranks: int, tmp_path: Path) -> None:
    """Compiled, loaded on all GPUs and run: what one graph says, in steps ahead and in graphs."""
    prepared = prepare(
        MODELS / f"{spec}.yaml", size="tiny", weights="random", max_sequence=64, max_batch=1, precision=precision,
        target="sm90", toolchain="tensorrt-8.6", out=tmp_path / "bundle", tensor_parallel=ranks,
    )  # fmt: skip
    weights = weights_of(prepared)
    rows = random_rows(prepared.source.config["vocab"], (7,))
    expected = [row["logits"] for row in outputs(quantized_graph(prepared), weights, rows)]
    with runtime.load(compile_with(prepared, weights)) as model:
        assert agreement(model.logits(rows), expected).relative <= load_recipe(precision).bound.relative
        (new,) = model.generate(rows, max_new_tokens=3, stop=())
        (again,) = model.logits([[*rows[0], *new]])
    for at, token in enumerate(new):
        best = again[len(rows[0]) + at - 1]
        assert best[token] >= np.max(best) - 0.05 * np.abs(best).max()  # other sums in another company


@pytest.mark.usefixtures("gpus")
def test_gpus_that_are_not_those_of_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = replace(fake.bundle("decoder"), tensor=2)
    program = replace(here.program, steps=(Step("program", "cuda", "a.ir", {}, {}, {}),))
    monkeypatch.setattr(Bundle, "open", lambda *_, **__: replace(here, program=program))
    for devices in ([0], [0, 0], [0, -1], [0, 1, 2]):
        with pytest.raises(SpecRTError, match="2 different GPUs"):
            runtime.load(tmp_path, devices=devices)
    check_raises("RUN-043", runtime.load, tmp_path, devices=[0])
    monkeypatch.setattr(sys.modules["runtime.cuda.ranks"], "count", lambda: 1)
    check_raises("RUN-044", runtime.load, tmp_path)
    monkeypatch.setattr(Bundle, "open", lambda *_, **__: here)
    check_raises("RUN-043-cpu", runtime.load, tmp_path, devices=[0])
