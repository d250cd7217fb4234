"""Bundles for a GPU, and building their engines: with a recorded TensorRT, on no GPU."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compiler
from compiler.api import compile_with, weights_of
from compiler.explain import explain
from compiler.ir.parser import parse
from compiler.ir.types import Sym
from compiler.kernels import library
from compiler.lower.segments import digest
from compiler.lower.tensorrt import dialects, plans
from compiler.lower.tensorrt.build import build_segment, configure, import_tensorrt, make_logger
from compiler.lower.tensorrt.dialects import dialect
from compiler.lower.tensorrt.options import BuildOptions, read_options
from compiler.lower.tensorrt.stored import stored_arrays
from compiler.plan import plan_of
from runtime.bundle import Bundle
from runtime.cuda import missing
from specs.errors import SpecRTError
from tests.golden_errors import ROOT, check_raises
from tests.tensorrt import recorder
from tests.tensorrt.recorder.network import Config

GPU = "NVIDIA H200"
ENGINES = 6  # of the demo model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model for sm90 in float16, in engines; its kernels left out: tests/kernels has them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(library, "write_kernels", lambda *_: None)
    patch.setattr(plans, "installed", lambda: None)
    out = tmp_path_factory.mktemp("gpu") / "bundle"
    given: dict[str, Any] = {"target": "sm90", "toolchain": "tensorrt-8.6", "precision": "fp16", "out": out}
    prepared = compiler.prepare(ROOT / "demo" / "tiny-llama", build=(("segments", "engines"),), **given)
    compile_with(prepared, weights_of(prepared))
    patch.undo()
    return out


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECRT_CACHE", str(tmp_path / "cache"))


def test_a_bundle_is_what_the_runtime_reads(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    program = opened.program
    assert opened.toolchain == {"tensorrt": "8.6"}
    # angles, then a layer's q k v, o and mlp with norms between, and the head
    layer = ["program", "engine", "kernel", "engine", "program", "engine"]
    assert [step.kind for step in program.steps] == ["program", *layer * 6, "program", "engine"]
    # of 19 calls: the last layer's o and mlp take the rows that are asked for
    assert len({step.file for step in program.steps if step.kind == "engine"}) == ENGINES
    bound = [name for step in program.steps for name in step.inputs.values()]
    assert {name.removeprefix("weight:") for name in bound if name.startswith("weight:")} == set(program.weights)
    written = {name for step in program.steps for name in step.outputs.values()}
    assert set(program.types) == {port.name for port in program.inputs} | written
    for step in program.steps:
        if step.kind == "engine":
            graph = parse((bundle / step.file).read_text())
            assert set(step.inputs) == {value.name for value in graph.inputs}
            assert set(step.outputs) == {port for port, _ in graph.outputs}


def test_weights_lie_as_the_plan_says(bundle: Path) -> None:
    plan = json.loads((bundle / "plan.json").read_text())
    tensors = load_file(bundle / "weights-00001-of-00001.safetensors")
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        name: weight["shape"] for name, weight in plan["weights"].items()
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    read = stored_arrays(bundle, plan["weights"])
    assert torch.equal(torch.from_numpy(read("layers.2.attn.w").copy()), tensors["layers.2.attn.w"])


def test_random_weights_are_left_to_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(library, "write_kernels", lambda plan, *_: seen.append(plan))
    spec = ROOT / "specs" / "models" / "llama.yaml"
    out = compiler.compile(spec, size="demo", weights="random", target="sm80", precision="fp16", out=tmp_path / "b")
    assert not list(out.glob("*.safetensors"))
    assert {weight["file"] for weight in seen[0]["weights"].values()} == {None}


# -- building ---------------------------------------------------------------------------------------------------------


def recorded(version: str, monkeypatch: pytest.MonkeyPatch, reasons: tuple[str, ...] = ()) -> tuple[Any, list[Any]]:
    """A recorded TensorRT whose builds are kept; with `reasons` they fail, and say so in the log."""
    trt, builds = recorder.module(version), []

    def build(builder: recorder.Builder, network: Any, config: Any) -> bytes | None:
        network.finish()
        builds.append((network, config))
        for reason in reasons:
            builder._logger.log("Severity.ERROR", reason)
        return None if reasons else b"plan of " + network._outputs[0].name.encode()

    monkeypatch.setattr(recorder.Builder, "build_serialized_network", build)
    return trt, builds


def test_engines_are_built_once_and_kept(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(bundle, first)
    shutil.copytree(bundle, second)
    trt, builds = recorded("8.6.0", monkeypatch)
    events: list[tuple[str, int, int]] = []
    made = plans.build_bundle(first, trt=trt, gpu=GPU, progress=lambda *event: events.append(event))
    assert events == [("engines", number, ENGINES) for number in range(ENGINES)]
    assert [plan.cached for plan in made] == [False] * ENGINES
    assert {plan.path.parent.name for plan in made} == {"tensorrt-8.6.0-NVIDIA_H200"}
    assert plans.tag("8.6.0", GPU) == missing.tag("8.6.0", GPU) == made[0].path.parent.name
    assert made[0].path.read_bytes().startswith(b"plan of ")
    note = json.loads(made[0].path.with_suffix(".json").read_text())
    assert (note["tensorrt"], note["gpu"]) == ("8.6.0", GPU)
    assert all(plan.cached for plan in plans.build_bundle(first, trt=trt, gpu=GPU))
    # another bundle of the same shape takes them from the cache, another GPU does not
    assert all(plan.cached for plan in plans.build_bundle(second, trt=trt, gpu=GPU))
    assert len(builds) == ENGINES
    assert not any(plan.cached for plan in plans.build_bundle(second, trt=trt, gpu="NVIDIA L4"))
    assert len(builds) == 2 * ENGINES
    Bundle.open(first)  # engines are not among its files
    made[0].path.write_bytes(b"torn")
    assert not plans._whole(made[0].path)


def test_the_timing_cache_grows_and_is_shared(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    shutil.copytree(bundle, tmp_path / "copy")
    trt, builds = recorded("8.6.0", monkeypatch)
    plans.build_bundle(tmp_path / "copy", trt=trt, gpu=GPU)
    given = [config._state["timing_cache"] for _, config in builds]
    assert given == [(b"", False), *[(b"timing cache", False)] * (ENGINES - 1)]
    assert (plans.cache_folder() / "timing" / "tensorrt-8.6.0-NVIDIA_H200.cache").read_bytes() == b"timing cache"


def test_timings_that_tensorrt_cannot_read_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen on a GPU: it says so, builds without, and gives a grown cache that it can't read either."""
    trt, _ = recorded("8.6.0", monkeypatch)
    options = read_options({"toolchain": "tensorrt-8.6"})
    built = recorder.Builder.build_serialized_network

    def build(builder: recorder.Builder, network: Any, config: Any) -> bytes | None:
        builder._logger.log("Severity.ERROR", "4: The timing cache will not be used!")
        return built(builder, network, config)

    monkeypatch.setattr(recorder.Builder, "build_serialized_network", build)
    assert build_segment(trt, SEGMENT, PROFILES, options, timing=b"broken") == (b"plan of out", b"")


def test_timings_that_cannot_be_read_back_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen on a GPU: 8.6 wrote caches, after ordinary builds, that it refused when it read them."""
    trt, _ = recorded("8.6.0", monkeypatch)
    logger = make_logger(trt)

    def create(_: Config, data: bytes) -> bytes:
        if data == b"timing cache":
            logger.log("Severity.ERROR", "1: [myelinCache.h::deserializeFromBuffer::52] Error Code 1")
        return data

    monkeypatch.setattr("compiler.lower.tensorrt.build.make_logger", lambda _: logger)
    monkeypatch.setattr(Config, "create_timing_cache", create)
    options = read_options({"toolchain": "tensorrt-8.6"})
    assert build_segment(trt, SEGMENT, PROFILES, options, timing=b"before") == (b"plan of out", b"before")


def test_timings_of_another_tensorrt_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    trt, builds = recorded("8.6.0", monkeypatch)
    taken = Config.set_timing_cache

    def refuse(config: Config, cache: Any, ignore_mismatch: bool) -> bool:
        return taken(config, cache, ignore_mismatch) and cache == b""

    monkeypatch.setattr(Config, "set_timing_cache", refuse)
    options = read_options({"toolchain": "tensorrt-8.6"})
    assert build_segment(trt, SEGMENT, PROFILES, options, timing=b"other")[1] == b"timing cache"
    assert builds[0][1]._state["timing_cache"] == (b"", False)


def test_an_engine_of_a_model_with_other_names_is_not_taken() -> None:
    """Seen on a GPU: two families' first segments computed the same, with ports of other names."""
    one = SEGMENT
    other = parse(str(one).replace("%x", "%norm_in.2").replace("out =", "result ="))
    options = read_options({"toolchain": "tensorrt-8.6"})
    keys = [plans._key(digest(graph), graph, "8.6.0", GPU, PROFILES, options) for graph in (one, other)]
    assert digest(one) == digest(other)
    assert keys[0] != keys[1]


SEGMENT = parse("""graph segment(%x: f16[T,8], %w: f16[6,8]) {
  dim T in 1..16..512
  %mlp.up: f16[T,6] = matmul(%x, %w) {transpose_b = true} @ specs/models/model.yaml:38:17
  return out = %mlp.up
}
""")
PROFILES = ((Sym("T", 1, 4, 64),), (Sym("T", 65, 128, 512),))


def test_the_builder_is_told_what_the_deployment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    trt, builds = recorded("8.6.0", monkeypatch)
    options = BuildOptions(level=4, workspace_mib=512, hardware="ampere_plus", version_compatible=True)
    plan, timing = build_segment(trt, SEGMENT, PROFILES, options)
    ((_, config),) = builds
    assert (plan, timing) == (b"plan of out", b"timing cache")
    assert config._flags == {"FP16", "OBEY_PRECISION_CONSTRAINTS", "VERSION_COMPATIBLE"}
    assert config._limits == {"WORKSPACE": 512 << 20}
    assert config.builder_optimization_level == 4
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert config._state["tactic_sources"] == 0b11000
    assert len(config._profiles) == 2


@pytest.mark.parametrize("version", recorder.VERSIONS[1:])
def test_strongly_typed_builders_get_no_precision_flags(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trt, builds = recorded(version, monkeypatch)
    options = BuildOptions(toolchain="tensorrt-10.0", weights="baked", weight_streaming=True)
    build_segment(trt, SEGMENT, PROFILES, options)
    assert builds[0][1]._flags == {"WEIGHT_STREAMING"}


def test_baked_weights_are_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("8.6.0", "10.0.1"):
        trt, builds = recorded(version, monkeypatch)
        dtype = "f16" if version == "8.6.0" else "bf16"
        graph = parse(
            f'graph segment(%x: {dtype}[T,8]) {{ dim T in 1..4..64 %w: {dtype}[6,8] = weight() {{name = "w"}} '
            f"%y: {dtype}[T,6] = matmul(%x, %w) {{transpose_b = true}} return y = %y }}"
        )
        w = torch.randn(6, 8).to(torch.float16 if dtype == "f16" else torch.bfloat16)
        bits = w.numpy() if dtype == "f16" else w.view(torch.uint16).numpy()
        build_segment(trt, graph, PROFILES[:1], BuildOptions(), baked=lambda _, bits=bits: bits)
        x = torch.randn(3, 8).to(w.dtype)
        assert torch.equal(builds[0][0].evaluate({"x": x})["y"], x @ w.T)


def test_a_failed_build_says_why_and_where(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    reasons = ("Could not find any implementation for node mlp.up @ model.yaml:38.", "Build failed")
    trt, _ = recorded("8.6.0", monkeypatch, reasons)
    with caplog.at_level(logging.WARNING, "compiler.tensorrt"):
        check_raises("LOWER-035", build_segment, trt, SEGMENT, PROFILES, BuildOptions())
    assert [record.message for record in caplog.records] == list(reasons)
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    with pytest.raises(SpecRTError):
        plans.build_bundle(copy, trt=trt, gpu=GPU)
    assert not list(copy.rglob("*.plan"))
    assert not plans.cache_folder().exists()


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("", {"level": 9}),
        ("-unknown", {"speed": 3}),
        ("-hardware", {"hardware": "any"}),
        ("-weights", {"weights": "both"}),
        ("-workspace", {"workspace_mib": 0}),
        ("-version", {"hardware": "same_capability"}),
        ("-attention", {"attention": "flash"}),
        ("-segments", {"segments": "some"}),
        ("-alone", {"segments": "kernels", "weights": "baked"}),
        ("-native", {"attention": "native", "toolchain": "tensorrt-10.8"}),
        ("-streaming", {"weight_streaming": True, "weights": "baked"}),
        ("-streaming-inputs", {"weight_streaming": True, "toolchain": "tensorrt-10.8"}),
    ],
)
def test_options_that_no_builder_takes(name: str, given: dict[str, Any]) -> None:
    check_raises(f"LOWER-033{name}", read_options, given)


def test_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    check_raises("LOWER-034", import_tensorrt)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    check_raises("LOWER-036", plans.find_device)
    driver = SimpleNamespace(cuInit=_without_a_driver)
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    check_raises("LOWER-036-driver", plans.find_device)


def _without_a_driver(_flags: int) -> None:
    raise RuntimeError("`cuda` is a library of the driver, which is not found")


def test_another_tensorrt_than_the_bundle_is_for(bundle: Path) -> None:
    check_raises("LOWER-037", plans.build_bundle, bundle, trt=recorder.module("10.8.0"), gpu=GPU)


def test_a_cpu_bundle_needs_no_engines(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"steps": [{"backend": "openvino", "file": "engine/0.xml"}]}')
    assert plans.build_bundle(tmp_path) == []


def test_float16_has_kernels_where_engines_add_in_it() -> None:
    """8.6 has no engine with sums in float32: kernels, unless engines are asked for or kernels lack something."""
    found = {}
    for spec, toolchain, precision, target, build in (
        ("llama", "8.6", "fp16", "sm90", ()),
        ("llama", "8.6", "fp16", "sm75", ()),  # where our compiler of kernels has no tensor cores
        ("llama", "8.6", "fp16", "sm90", (("segments", "engines"),)),
        ("llama", "8.6", "fp16", "sm90", (("weights", "baked"),)),
        ("llama", "8.6", "fp32", "sm90", ()),
        ("llama", "8.6", "w8a8_sq_static", "sm90", ()),
        ("llama", "10.8", "fp16", "sm90", ()),
        ("deepseek_v3", "8.6", "fp16", "sm90", ()),  # no kernel has its router
    ):
        given: dict[str, Any] = {"toolchain": f"tensorrt-{toolchain}", "precision": precision, "build": build}
        prepared = compiler.prepare(ROOT / "specs" / "models" / f"{spec}.yaml", size="tiny", target=target, **given)
        engines = [step for step in plan_of(prepared)["steps"] if step["backend"] == "tensorrt"]
        found[(spec, toolchain, precision, target, *build)] = bool(engines)
    assert [key for key, engines in found.items() if not engines] == [("llama", "8.6", "fp16", "sm90")]


def test_requests_that_no_gpu_serves() -> None:
    demo = ROOT / "demo" / "tiny-llama"
    check_raises("CLI-023", compiler.prepare, demo, toolchain="tensorrt-8.6")
    check_raises("CLI-024", compiler.prepare, demo, pipeline_parallel=2)
    for key, value, toolchain in (("attention", "native", "10.16"), ("weights", "baked", "8.6")):
        given: dict[str, Any] = {"toolchain": f"tensorrt-{toolchain}", "precision": "fp16", "build": ((key, value),)}
        check_raises(f"LOWER-033-{value}-pipeline", compiler.prepare, demo, target="sm90", pipeline_parallel=2, **given)
    bf16: dict[str, Any] = {"precision": "bf16", "toolchain": "tensorrt-8.6"}
    check_raises("PREC-010-sm75-bf16", compiler.prepare, demo, target="sm75", **bf16)
    for name, given in (("baked", ("weights", "baked")), ("tf32", ("tf32", True)), ("bf16", ("segments", "engines"))):
        check_raises(f"LOWER-033-{name}", compiler.prepare, demo, target="sm90", build=(given,), **bf16)
    check_raises("PREC-010-sm120", compiler.prepare, demo, target="sm120", precision="fp16", toolchain="tensorrt-8.6")
    assert compiler.prepare(demo, target="sm90", precision="bf16", toolchain="tensorrt-10.8").request.on_gpu


def test_several_gpus_are_a_key_of_a_deployment(tmp_path: Path) -> None:
    path = tmp_path / "deploy.yaml"
    text = "deployment: 1\nmodel: %s\ntarget: sm90\nparallel: {pipeline: 3}\n"
    path.write_text(text % (ROOT / "specs" / "models" / "llama.yaml"), "utf-8")
    asked = compiler.api.request(path)
    assert (asked.tensor_parallel, asked.pipeline_parallel, asked.gpus) == (1, 3, 3)
    assert compiler.api.request(path, pipeline_parallel=2).gpus == 2


def test_the_installed_tensorrt_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialects, "installed", lambda: None)
    assert dialects.default_toolchain() == "tensorrt-8.6"
    monkeypatch.setattr(dialects, "installed", lambda: "10.9.0.34")
    assert dialects.default_toolchain() == "tensorrt-10.8"


def test_float32_is_not_tf32() -> None:
    trt = recorder.module("8.6.0")
    config = trt.Builder(trt.Logger()).create_builder_config()
    config.set_flag(trt.BuilderFlag.TF32)  # on by default
    configure(trt, config, parse(str(SEGMENT).replace("f16", "f32")), dialect("8.6.0"), BuildOptions())
    assert config._flags == {"OBEY_PRECISION_CONSTRAINTS"}
    assert config._features == {"PROFILE_SHARING_0806"}  # a captured graph keeps a context of its own


@pytest.mark.parametrize("version", recorder.VERSIONS)
def test_tf32_is_asked_for_by_its_precision(version: str) -> None:
    """Tensors are float32 in every version; strongly typed networks keep this flag."""
    line = dialect(version)
    target = {"size": "tiny", "weights": "random", "target": "sm90", "toolchain": line.toolchain}
    tf32, fp32 = (
        compiler.prepare(ROOT / "specs" / "models" / "llama.yaml", precision=name, **target)
        for name in ("tf32", "fp32")
    )
    assert str(tf32.graph) == str(fp32.graph)
    assert plan_of(tf32)["build"] == plan_of(fp32)["build"] | {"tf32": True}
    assert any("TF32" in fact.text for fact in explain(tf32).facts)
    trt = recorder.module(version)
    config = trt.Builder(trt.Logger()).create_builder_config()
    configure(trt, config, parse(str(SEGMENT).replace("f16", "f32")), line, read_options(plan_of(tf32)["build"]))
    assert "TF32" in config._flags
