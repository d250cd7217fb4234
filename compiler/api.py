"""`compile`: a model written as data in, a bundle out; `prepare`: the same up to the backend, for reading only."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.frontend import Built, Limits, build
from compiler.ir import Graph
from compiler.precision.chosen import Chosen, LayerPrecision, choose
from compiler.source import Source, resolve
from specs.errors import SpecRTError

if TYPE_CHECKING:
    from compiler.lower.tensorrt.options import BuildOptions
    from compiler.passes.quantization_plan import Experts
    from compiler.passes.runner import PassReport
    from compiler.quantization.stored_codes import Stored
    from compiler.validate.gates import Gates
    from compiler.weights import Weights
    from specs.weight_source import WeightSource

Progress = Callable[[str, int, int], None]
DEFAULT_SEQUENCE = 2048  # tokens, where neither the caller nor the model states a longest sequence


@dataclass(frozen=True)
class Request:
    """Everything that decides a bundle; a deployment spec has a key for each."""

    source: Path
    checkpoint: Path | None = None
    size: str | None = None
    target: str = "cpu"
    precision: str | None = None  # a low-bit checkpoint's own, else fp32
    kv_cache: str | None = None  # None: as the precision's recipe says
    max_batch: int = 8
    max_sequence: int | None = None
    tensor_parallel: int = 1  # GPUs that share each product
    pipeline_parallel: int = 1  # stages of neighbouring layers, each on GPUs of its own
    weights: str = "checkpoint"
    seed: int = 0
    out: Path | None = None
    toolchain: str | None = None  # of a GPU; None: the installed TensorRT's, else the default
    build: tuple[tuple[str, Any], ...] = ()  # further options of its builder
    calibration: Path | None = None
    layers: tuple[LayerPrecision, ...] = ()
    gates: Gates | None = None
    card: Mapping[str, Any] | None = None  # how its gates were reached, for the passport

    @property
    def on_gpu(self) -> bool:
        """Whether the target is a GPU's architecture."""
        return self.target != "cpu"

    @property
    def architecture(self) -> int:
        """Of the GPU: 90 for sm90."""
        return int(self.target.removeprefix("sm"))

    @property
    def gpus(self) -> int:
        """How many GPUs run the bundle."""
        return self.tensor_parallel * self.pipeline_parallel

    def options(self) -> BuildOptions:
        """What a GPU's engines are built with. Raises SpecRTError LOWER-030 and LOWER-033."""
        from compiler.lower.tensorrt.dialects import default_toolchain
        from compiler.lower.tensorrt.options import asked_options

        return asked_options({**dict(self.build), "toolchain": self.toolchain or default_toolchain()}, self.gpus)


@dataclass(frozen=True)
class Prepared:
    """A model after all passes: no weight was read and no backend asked."""

    request: Request
    source: Source
    built: Built
    graph: Graph
    reports: tuple[PassReport, ...]
    limits: Limits
    role: str
    precision: Chosen
    seconds: dict[str, float] = field(default_factory=dict)
    ranks: tuple[Graph, ...] = ()  # where several GPUs share each product, the graph of each
    split: PassReport | None = None  # and what was split how

    @property
    def lowered(self) -> Graph:
        """What is cut and lowered: the graph, or that of the first of several ranks."""
        return self.ranks[0] if self.ranks else self.graph

    @cached_property
    def options(self) -> BuildOptions:
        """What a GPU's segments are built with: as asked, and what the precision says. Raises SpecRTError LOWER-033."""
        from compiler.lower.tensorrt.lowering import settled

        asked, chosen = self.request, self.precision
        return settled(asked.options(), self.lowered, chosen.base, chosen.decision.how, asked.architecture)


def request(source: str | Path, **options: Any) -> Request:
    """Options over the keys of a deployment spec (where `source` is one) over the defaults; None leaves a key alone."""
    from specs.archive import is_archive
    from specs.deployment import is_deployment, load_deployment

    given = {key: value for key, value in options.items() if value is not None}
    for key in ("checkpoint", "out", "calibration"):
        if key in given:
            given[key] = Path(given[key])
    path = Path(source)
    if not path.is_file() or is_archive(path) or not is_deployment(path):
        return _checked(Request(path, **given))
    deployment = load_deployment(path)
    stated: dict[str, Any] = {
        key: getattr(deployment, key)
        for key in ("size", "target", "toolchain", "precision", "kv_cache", "weights", "seed")
    }
    if deployment.build is not None:
        stated["build"] = deployment.build.given()
    if deployment.limits is not None:
        stated |= {key: getattr(deployment.limits, key) for key in ("max_batch", "max_sequence")}
    if deployment.parallel is not None:
        stated |= {f"{key}_parallel": getattr(deployment.parallel, key) for key in ("tensor", "pipeline")}
    for key in ("model", "checkpoint", "out", "calibration"):
        value = getattr(deployment, key)
        stated[key] = None if value is None else path.parent / value
    if str(stated["precision"]).endswith(".yaml"):
        stated["precision"] = str(path.parent / str(stated["precision"]))
    stated["layers"] = tuple(LayerPrecision(item.linears, item.precision, item.where) for item in deployment.layers)
    if deployment.gates is not None:
        from compiler.validate.gates import Gates

        limits = deployment.gates
        text = None if limits.text is None else path.parent / limits.text
        stated["gates"] = Gates(limits.mean_kl, limits.perplexity, limits.top1, text, limits.where)
    model = stated.pop("model") or stated.pop("checkpoint")
    return _checked(Request(model, **{**{key: value for key, value in stated.items() if value is not None}, **given}))


def _checked(request: Request) -> Request:
    from specs.hardware import gpu_names
    from specs.precision import load_caches

    for name, value, known in (
        ("target", request.target, ("cpu", *gpu_names())),
        ("weights", request.weights, ("checkpoint", "random")),
        ("kv_cache", request.kv_cache, (None, *load_caches())),
    ):
        if value not in known:
            listed = ", ".join(item for item in known if item is not None)
            raise SpecRTError("CLI-010", f"unknown {name} `{value}`", hint=f"known: {listed}")
    for name in ("max_batch", "max_sequence", "tensor_parallel", "pipeline_parallel"):
        number = getattr(request, name)
        if number is not None and number < 1:
            raise SpecRTError("CLI-011", f"`{name}` is {number}, expected 1 or more")
    if request.on_gpu:
        _check_gpu(request)
    elif request.gpus > 1:
        hint = "leave it out, or give a GPU as target: `--target sm90`"
        raise SpecRTError("CLI-024", f"the target cpu is one device, {request.gpus} are asked for", hint=hint)
    elif request.toolchain is not None or request.build:
        hint = "leave it out, or give a GPU as target: `--target sm90`"
        raise SpecRTError("CLI-023", "the target cpu has no toolchain or build options", hint=hint)
    return request


def _check_gpu(request: Request) -> None:
    """Raise SpecRTError PREC-010 where the GPU or the toolchain lacks the precision, or the toolchain the GPU."""
    from compiler.precision.decide import decide, require
    from specs.hardware import load_gpu, load_toolchain
    from specs.precision import STORED, load_recipe, with_cache

    if request.precision in (None, STORED):  # the checkpoint tells
        return
    toolchain = load_toolchain(request.options().toolchain)
    require(decide(with_cache(load_recipe(request.precision), request.kv_cache), toolchain, load_gpu(request.target)))


def prepare(
    source: str | Path, checkpoint: str | Path | None = None, *, dump: Path | None = None, **options: Any
) -> Prepared:
    """Resolve, build and run the passes; `dump` names a folder for the graph after each pass. Raises SpecRTError."""
    return prepare_request(request(source, checkpoint=checkpoint, **options), dump)


def prepare_request(asked: Request, dump: Path | None = None) -> Prepared:
    """`prepare` for options already collected."""
    from compiler.passes.runner import run_passes

    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name], clock = time.perf_counter() - clock, time.perf_counter()

    options = asked.options() if asked.on_gpu else None
    toolchain, native = ("openvino", False) if options is None else (options.toolchain, options.native)
    found = resolve(asked.source, asked.checkpoint, asked.size)
    longest = asked.max_sequence or found.config.get("context") or DEFAULT_SEQUENCE
    limits = Limits(asked.max_batch, int(longest))
    lap("spec")
    built = build(found.spec, found.config, limits)
    if found.parameters is not None and built.parameters != found.parameters:
        message = f"size `{asked.size}` states {found.parameters} parameters, its shapes have {built.parameters}"
        raise SpecRTError("SPEC-064", message, where=found.spec.sizes[str(asked.size)].where)
    lap("build")
    stored, cache = _stored(asked, found, built), asked.kv_cache
    precision = choose(
        asked.target, toolchain, asked.precision, asked.layers, stored, cache, native=native, experts=_experts(options)
    )
    role = role_of(found)
    if options is not None:
        from compiler.lower.tensorrt.options import for_base

        for_base(options, precision.base)  # what engines can't have is told before a weight is read
    if native:
        from compiler.lower.tensorrt.native import check_native

        check_native(precision.recipe.kv_cache, precision.recipe.where)
    graph, reports = run_passes(built.graph, precision.passes(role), dump=dump)
    ranks, split = _ranks(asked.tensor_parallel, built.graph, precision, role)
    lap("passes")
    return Prepared(asked, found, built, graph, reports, limits, role, precision, seconds, ranks, split)


def _ranks(count: int, graph: Graph, precision: Chosen, role: str) -> tuple[tuple[Graph, ...], PassReport | None]:
    """The graphs of GPUs that share each product, and how it was split; none for one GPU."""
    from compiler.passes.runner import run_passes
    from compiler.passes.split_tensors import NAME, split_tensors

    if count == 1:
        return (), None
    each = [run_passes(graph, precision.passes(role, split_tensors(count, rank))) for rank in range(count)]
    _, reports = each[0]
    return tuple(ready for ready, _ in each), next(report for report in reports if report.name == NAME)


def _experts(options: BuildOptions | None) -> Experts | None:
    """Which codes of experts a target reads: the CPU all, engines none, kernels some."""
    if options is None:
        return None
    if options.native or options.weights == "baked":
        return lambda _: "engines multiply experts as floats"
    from compiler.lower.expert_steps import why_not_kernels

    return why_not_kernels


def _stored(asked: Request, found: Source, built: Built) -> Stored | None:
    """The checkpoint's own low-bit weights, where they are asked for or nothing is."""
    from compiler.quantization.stored_codes import stored_in
    from specs.precision import STORED

    checkpoint = found.checkpoint
    if checkpoint is None or asked.weights == "random" or asked.precision not in (None, STORED):
        return None
    return stored_in(_sources(found, built), checkpoint) if checkpoint.low_bit else None


def _sources(source: Source, built: Built) -> dict[str, WeightSource]:
    from specs.weight_map import map_weights

    assert source.checkpoint is not None
    return map_weights(source.spec, source.config, built.weights, source.checkpoint)


def role_of(source: Source) -> str:
    """`encoder` where every token sees every other, else `decoder`: it can go on from a cache, token by token."""
    from specs.parts import ATTENTIONS

    env = {**source.config, "layer": 0}
    parts = (part for part in source.spec.parts.values() if isinstance(part, ATTENTIONS))
    return "encoder" if all(part.choice("mask", env) == "full" for part in parts) else "decoder"


def compile(  # noqa: A001 (the public name)
    source: str | Path,
    checkpoint: str | Path | None = None,
    *,
    size: str | None = None,
    target: str | None = None,
    toolchain: str | None = None,
    precision: str | None = None,
    kv_cache: str | None = None,
    out: str | Path | None = None,
    max_batch: int | None = None,
    max_sequence: int | None = None,
    tensor_parallel: int | None = None,
    pipeline_parallel: int | None = None,
    weights: str | None = None,
    seed: int | None = None,
    calibration: str | Path | None = None,
    dump: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Compile a spec (with `checkpoint`), a checkpoint folder or a deployment spec into a bundle; gives its path.

    `target` is cpu, or a GPU as sm90 with a `toolchain` as tensorrt-10.8; `precision` a recipe's
    name (specs/precisions) or file, or checkpoint: its own low-bit weights as they are, which a low-bit checkpoint
    gets where nothing says otherwise, others get fp32; `kv_cache` int8 or fp8 keeps keys and values in 8 bits with any
    of them; `calibration` a .npy file of token ids or a text file; `weights` checkpoint or random;
    `tensor_parallel` GPUs share each product, `pipeline_parallel` stages of layers are on GPUs of their own.
    Raises SpecRTError for every mistake in what was given; nothing is left behind then.
    """
    asked = request(
        source, checkpoint=checkpoint, size=size, target=target, toolchain=toolchain, precision=precision,
        kv_cache=kv_cache, out=out, max_batch=max_batch, max_sequence=max_sequence, tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel, weights=weights, seed=seed, calibration=calibration,
    )  # fmt: skip
    return compile_prepared(prepare_request(asked, dump), progress)


def default_out(prepared: Prepared) -> Path:
    """Where a bundle goes when nothing says so."""
    cache = "" if prepared.request.kv_cache is None else f"-kv_{prepared.request.kv_cache}"
    name = f"{prepared.source.label}-{prepared.request.target}-{prepared.precision.recipe.name}"
    ways = (("tp", prepared.request.tensor_parallel), ("pp", prepared.request.pipeline_parallel))
    return Path("build") / (f"{name}{cache}" + "".join(f"-{way}{count}" for way, count in ways if count > 1))


def settled(prepared: Prepared, progress: Progress | None = None) -> Prepared:
    """With the layers in higher precision that its gates need; unchanged where it has none, or has been settled."""
    if prepared.request.gates is None or prepared.request.card is not None:
        return prepared
    from compiler.validate.gates import within_gates

    return within_gates(prepared, progress)


def compile_prepared(prepared: Prepared, progress: Progress | None = None) -> Path:
    """Give a prepared model its weights, lower it and write the bundle; see `compile`."""
    prepared = settled(prepared, progress)
    asked = prepared.request
    # random weights of a GPU are made there: a 70B model needs no file of 140 GB
    on_device = asked.on_gpu and asked.weights == "random" and asked.options().weights == "inputs"
    return compile_with(prepared, None if on_device else weights_of(prepared, progress), progress)


def compile_with(prepared: Prepared, weights: Weights | None, progress: Progress | None = None) -> Path:
    """The same with weights from elsewhere, by name; None: a GPU makes random ones when the bundle is loaded."""
    from compiler.bundle import new_bundle, write_manifest
    from compiler.lower import lower
    from compiler.manifest import manifest_of
    from compiler.quantization.model import forget_calibration
    from compiler.text import copy_text

    asked = prepared.request
    out = asked.out or default_out(prepared)
    options = prepared.options if asked.on_gpu else None
    with new_bundle(out) as work:
        (work / "graph.ir").write_text(str(prepared.graph), encoding="utf-8")
        lowered = lower(
            prepared.graph, weights, work, target=asked.target, precision=prepared.precision.base, build=options,
            pipeline=asked.pipeline_parallel, ranks=prepared.ranks, progress=progress,
        )  # fmt: skip
        text = copy_text(prepared.source.checkpoint, work)
        write_manifest(work, manifest_of(prepared, lowered.toolchain, text))
    forget_calibration(out)
    if asked.on_gpu:
        from compiler.lower.tensorrt.plans import build_here

        build_here(out, asked.architecture, progress)
    return out


def weights_of(prepared: Prepared, progress: Progress | None = None) -> Weights:
    """The weights of its graph by name, each read or made on demand; calibrates first where the precision needs it.

    Raises SpecRTError CKPT-xxx for what the checkpoint lacks, PREC-012 to PREC-014 for the calibration.
    """
    from compiler.quantization.model import low_bit_weights

    return low_bit_weights(prepared, float_weights(prepared), progress)


def float_weights(prepared: Prepared) -> Weights:
    """The weights as the checkpoint has them."""
    from compiler.weights import checkpoint_weights, random_weights

    asked, source = prepared.request, prepared.source
    if asked.weights == "random":
        return random_weights(prepared.built.weights, asked.seed)
    if source.checkpoint is None:
        message = f"no checkpoint to take the weights of `{source.label}` from"
        raise SpecRTError("CKPT-020", message, hint="name a checkpoint folder, or give `--weights random`")
    return checkpoint_weights(_sources(source, prepared.built))
