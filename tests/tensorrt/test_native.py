"""Decoders in one engine, emitted for the versions that have the layers: prompts in pieces, then tokens, over slots.

The scheduler runs the recorded network; what it gives is compared with the model's own equations, each sequence alone
and whole, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import compiler
from compiler.explain import explain
from compiler.ir.interpreter import run
from compiler.ir.parser import parse
from compiler.ir.verify import verify
from compiler.lower.tensorrt import plans
from compiler.lower.tensorrt.cut import cut
from compiler.lower.tensorrt.dialects import dialect
from compiler.lower.tensorrt.network import create_network, emit
from runtime.engine import Engine
from runtime.executable import PACKED
from runtime.request import Request
from tests.golden_errors import ROOT, check_raises
from tests.precision.test_families import EMULATED, OWN_ROUNDING
from tests.tensorrt import recorder
from tests.tensorrt.driver import recorded, run_plan
from tests.tensorrt.low_bit import low_bit, native
from tests.tensorrt.models import SPECS, Tiny, tiny
from tests.tensorrt.native import SLOTS, Interpreted, Recorded
from tests.tensorrt.recorder.api import api
from tests.tensorrt.test_contract import MODEL, UNIT, batches, close
from tests.tensorrt.test_quantized import EXACT

ENCODERS = {"bert", "roberta"}
DECODERS = [path for path in SPECS if path.stem not in ENCODERS]
LLAMA = next(path for path in SPECS if path.stem == "llama")
VERSIONS = ("10.16.1", "11.4.0")
PROMPTS, NEW = ([3, 14, 15, 92, 65, 35, 89], [27, 18], [1, 61, 80, 33, 9]), 4
# Each family once in float32, where ids must agree, and once in 16 bits; one family in everything.
CASES = [
    *((path, "fp32", VERSIONS[index % 2]) for index, path in enumerate(DECODERS)),
    *((path, ("fp16", "bf16")[index % 2], VERSIONS[1 - index // 2 % 2]) for index, path in enumerate(DECODERS)),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of small operations: threads that wait for each other take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def served(model: Tiny, version: str) -> tuple[list[Request], Recorded]:
    """The prompts with new tokens each: the third waits until a slot is free, and long ones are cut."""
    executable = Recorded(model.graph, model.weights, version)
    verify(executable.segment.graph)
    assert parse(str(executable.segment.graph)) == executable.segment.graph
    names = [value.name for value in model.graph.inputs]
    own = {name: 2 if name == "prefix" else 1 for name in names if name not in PACKED}
    engine = Engine(executable, max_batch=SLOTS, max_sequence=64, vocab=160, inputs=names, step_tokens=4)
    requests = [engine.submit(PROMPTS[0], max_new_tokens=NEW, inputs=own)]
    for _ in range(2):  # the next ones come while it runs
        engine.step()
    requests += [engine.submit(prompt, max_new_tokens=NEW, inputs=own) for prompt in PROMPTS[1:]]
    while engine.busy:
        engine.step()
    return requests, executable


def reference(model: Tiny, request: Request) -> torch.Tensor:
    """Logits of a sequence's tokens by the equations as built: float32, no cache, no fusion."""
    count = len(request.tokens) - 1
    at = torch.arange(count, dtype=torch.int32)[None]
    prompt = len(request.tokens) - len(request.new)
    known = {"tokens": torch.tensor([request.tokens[:-1]], dtype=torch.int32), "positions": at}
    known |= {"rows": torch.zeros_like(at), "lengths": torch.clamp(at + 1, min=prompt)}
    known |= {name: torch.tensor([value], dtype=torch.int32) for name, value in request.inputs.items()}
    inputs = {value.name: known[value.name] for value in model.built.graph.inputs}
    return run(model.built.graph, inputs, model.weights)["logits"][0]


@pytest.mark.parametrize(("path", "precision", "version"), CASES, ids=lambda item: getattr(item, "stem", item))
def test_generates_what_the_model_says(path: Path, precision: str, version: str) -> None:
    model = tiny(path, precision, native=True)
    requests, executable = served(model, version)
    assert (1, 4) in executable.shapes or (1, 7) in executable.shapes  # a prompt, in a piece or whole
    assert any(sequences > 1 and tokens == 1 for sequences, tokens in executable.shapes)
    for request in requests:
        logits = reference(model, request)[-NEW:]
        likeliest, chosen = logits.max(-1), torch.tensor(request.new)
        if precision == "fp32":
            assert request.new == likeliest.indices.tolist()
        # a token that is not the likeliest is as good as it, within what rounding may do
        off = likeliest.values - logits.gather(1, chosen[:, None])[:, 0]
        assert float(off.max()) <= 2 * MODEL * UNIT[precision] * float(logits.abs().max())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", list(UNIT))
@pytest.mark.parametrize("path", [path for path in SPECS if path.stem in ENCODERS], ids=lambda path: path.stem)
def test_encoders(path: Path, precision: str, version: str) -> None:
    """They are one engine in any case; their attention is TensorRT's too."""
    model = tiny(path, precision, native=True)
    pieces = cut(model.graph)
    weights = {name: tensor.make(model.weights) for name, tensor in pieces.tensors.items()}
    engine = recorded(recorder.module(version), dialect(version), native=True)
    for batch in batches(model):
        got = run_plan(pieces, batch, weights, {}, engine)
        expected = run(pieces.graph, batch, weights.__getitem__)
        for name, tensor in got.items():
            rows = batch["positions"] >= 0 if tensor.ndim == 3 else slice(None)
            close(tensor[rows], expected[name][rows], MODEL * UNIT[precision], name)
    (segment,) = pieces.segments.values()
    trt = recorder.module(version)
    network = create_network(trt, trt.Builder(None), dialect(version))
    emitter = emit(trt, segment.graph, network, dialect(version), native=True)
    kinds = [layer._kind for layer in network._layers]
    assert emitter.native
    assert kinds.count(dialect(version).attention) == 3  # one in each layer
    assert "add_softmax" not in kinds


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", list(UNIT))
def test_logits(precision: str, version: str) -> None:
    """Of all tokens of a prompt, for one family in every precision and version."""
    model = tiny(LLAMA, precision, native=True)
    executable = Recorded(model.graph, model.weights, version)
    engine = Engine(executable, max_batch=SLOTS, max_sequence=64, vocab=160, step_tokens=4)
    requests = logits_of(engine)
    for prompt, request in zip(PROMPTS, requests, strict=True):
        request.tokens = [*prompt, 0]
        expected = reference(model, request)
        close(torch.from_numpy(request.logits), expected, MODEL * UNIT[precision], "logits")


def logits_of(engine: Engine) -> list[Request]:
    """The logits of all tokens of the prompts."""
    requests = [engine.submit_logits(prompt) for prompt in PROMPTS]
    while engine.busy:
        engine.step()
    return requests


@pytest.mark.parametrize("recipe", sorted({recipe for recipe, _ in native("tensorrt-11.4")}))
def test_quantized_products_are_in_the_engine_too(recipe: str) -> None:
    """Where the toolchain's file calls them native; in float32, against the meaning of the IR on the same codes."""
    model = low_bit(LLAMA, recipe, "fp32", one_engine=True)
    recorded = Recorded(model.graph, model.weights, "11.4.0", baked=model.baked)
    meant = Interpreted(model.graph, model.weights, baked=model.baked)
    both = [Engine(one, max_batch=SLOTS, max_sequence=64, vocab=160, step_tokens=4) for one in (recorded, meant)]
    for got, expected in zip(*(logits_of(engine) for engine in both), strict=True):
        rows, wanted = (torch.from_numpy(request.logits) for request in (got, expected))
        # most rows but for the order of sums, a code on a tie moves one by the recipe's own error
        each = (rows - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert each.median() <= EXACT
        assert each.max() <= EMULATED.get(recipe, OWN_ROUNDING.get(recipe, 1e-4))


# -- the bundle -------------------------------------------------------------------------------------------------------

DEPLOYMENT = """\
deployment: 1
checkpoint: {demo}
target: sm90
toolchain: tensorrt-11.4
precision: bf16
build: {{attention: native}}
limits: {{max_batch: 4, max_sequence: 64}}
"""


@pytest.fixture
def deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(plans, "installed", lambda: None)
    monkeypatch.setenv("SPECRT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "deployment.yaml"
    path.write_text(DEPLOYMENT.format(demo=ROOT / "demo" / "tiny-llama"), encoding="utf-8")
    return path


def test_a_deployment_is_one_engine(deployment: Path) -> None:
    out = compiler.compile(deployment, out=deployment.parent / "bundle")
    plan = json.loads((out / "plan.json").read_text())
    (step,) = plan["steps"]
    assert "weight:layers.0.attn.w" in step["inputs"].values()  # of queries, keys and values together
    layers = plan["cache"]["layers"]
    assert (plan["cache"]["kind"], plan["cache"]["block_size"], len(layers)) == ("linear", 128, 6)
    caches = {f"cache:{layer[name]}" for layer in layers for name in "kv"}
    assert caches == {name for name in step["inputs"].values() if name.startswith("cache:")}
    assert caches | {plan["outputs"]["logits"]} == set(step["outputs"].values())
    assert {name: ranges[2] for name, ranges in plan["profiles"][0].items()} == {"B": 4, "S": 1, "N": 4}
    assert {name: ranges[2] for name, ranges in plan["profiles"][1].items()} == {"B": 1, "S": 64, "N": 64}
    kernels = json.loads((out / "kernels" / "kernels.json").read_text())
    assert (list(kernels["others"]), kernels["sets"], kernels["programs"]) == (["choose"], {"sm90": []}, {"sm90": {}})
    # the builder is told the same shapes
    builder = recorder.Builder(api("11.4.0"), None)
    trt = recorder.module("11.4.0")
    trt.Builder = lambda _: builder
    (built,) = plans.build_bundle(out, trt=trt, gpu="none")
    assert built.path.is_file()
    ((_, config),) = builder._built
    profiles = [profile._shapes for profile in config._profiles]
    assert [shapes["tokens"][2] for shapes in profiles] == [(4, 1), (1, 64)]
    assert {shapes["layers.0.attn.k_cache"][2] for shapes in profiles} == {(4, 4, 128, 32), (1, 4, 128, 32)}


def test_what_is_refused(deployment: Path) -> None:
    text = DEPLOYMENT.format(demo=ROOT / "demo" / "tiny-llama")
    deployment.write_text(text.replace("bf16", "w8a16"))
    check_raises("LOWER-038-kernels", compiler.compile, deployment, out=deployment.parent / "bundle")
    deployment.write_text(f"{text}kv_cache: int8\n")
    check_raises("LOWER-038-cache", compiler.prepare, deployment)


def test_explained(deployment: Path) -> None:
    told = explain(compiler.prepare(deployment))
    facts = {fact.subject: fact.text for fact in told.facts}
    assert "linear KV cache" in facts["role"]
    assert facts["engines"].startswith("tensorrt-11.4: one engine")
    assert facts["cache"].endswith("take 1.6 MB")  # rows of 128 places, whatever the length
    answers = {story.op: (story.answer, story.reason) for story in told.operations}
    assert answers["state"][1].startswith("an input and an output of the engine")
    assert answers["rotate"][0] == "emit"


# -- what the recorder holds a network to ------------------------------------------------------------------------------


def cached(version: str = "11.4.0") -> tuple[Any, Any, Any, list[Any]]:
    """A network with a cache, an update of it and a mask, all inputs."""
    trt = recorder.module(version)
    network = create_network(trt, trt.Builder(None), dialect(version))
    cache = network.add_input("cache", trt.DataType.HALF, (-1, 2, 64, 8))
    new = network.add_input("new", trt.DataType.HALF, (-1, 2, -1, 8))
    places = network.add_input("places", trt.DataType.INT32, (-1,))
    mask = network.add_input("mask", trt.DataType.BOOL, (-1, 1, -1, 64))
    return trt, network, trt.KVCacheMode.LINEAR, [cache, new, places, mask]


def test_a_cache_is_an_input_and_an_output() -> None:
    trt, network, linear, (cache, new, places, _) = cached()
    wide = network.add_cast(cache, trt.DataType.HALF).get_output(0)
    with pytest.raises(AssertionError, match="must be an input"):
        network.add_kv_cache_update(wide, new, places, linear)
    moving = network.add_input("moving", trt.DataType.HALF, (-1, 2, -1, 8))
    with pytest.raises(AssertionError, match="static number of places"):
        network.add_kv_cache_update(moving, new, places, linear)
    _, network, linear, (cache, new, places, _) = cached()
    network.add_kv_cache_update(cache, new, places, linear).name = "update"
    with pytest.raises(AssertionError, match="update: must be an output"):
        network.finish()


def test_nobody_reads_a_cache_from_before_its_update() -> None:
    _, network, linear, (cache, new, places, _) = cached()
    update = network.add_kv_cache_update(cache, new, places, linear)
    early = network.add_identity(cache)
    for layer, name in ((update, "update"), (early, "early")):
        layer.name = name
        layer.get_output(0).name = f"{name}.out"
        network.mark_output(layer.get_output(0))
    with pytest.raises(AssertionError, match="read a cache from before its update"):
        network.finish()


def test_a_mask_is_bool_or_of_the_type_of_the_queries_and_alone() -> None:
    trt, network, linear, (cache, new, places, mask) = cached()
    keys = network.add_kv_cache_update(cache, new, places, linear).get_output(0)
    softmax, kinds = trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind
    plain = network.add_attention_v2(new, keys, keys, softmax, kinds.NONE)
    with pytest.raises(AssertionError, match="a mask of FLOAT"):
        plain.mask = network.add_cast(mask, trt.DataType.FLOAT).get_output(0)
    causal = network.add_attention_v2(new, keys, keys, softmax, kinds.LOWER_RIGHT)
    with pytest.raises(AssertionError, match="a mask and a kind"):
        causal.mask = mask
    with pytest.raises(AttributeError, match="add_attention_v2"):
        _ = cached("10.16.1")[1].add_attention_v2
