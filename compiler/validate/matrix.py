"""Puts a report together: what the data says of every cell, and what was emulated, emitted or executed."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

import specs
from compiler.api import Prepared, prepare
from compiler.precision import decide
from compiler.precision.decide import Decision, Reason
from compiler.validate.emulate import Subject
from compiler.validate.fit import Part, fit
from compiler.validate.load import Sizes, sizes_of
from compiler.validate.records import Record, age
from compiler.validate.report import CPU, RANK, Cell, Evidence, Report
from specs.errors import SpecRTError
from specs.hardware import Gpu, load_gpu, load_toolchain
from specs.precision import Recipe, load_recipe

_RATES = {"tf32": "tf32", "fp16": "fp16", "bf16": "fp16", "fp8": "fp8", "mxfp8": "fp8", "int8": "int8",
          "nvfp4": "fp4", "mxfp4": "fp4"}  # fmt: skip
_LACKING = ("LOWER-001", "LOWER-039")  # what a model has that kernels have not; other errors are mistakes


@dataclass(frozen=True)
class Model:
    """A row of the matrix: what is emulated, and the published size that memory and speed are told for."""

    name: str
    title: str
    subject: Subject
    size: str | None
    had: tuple[str, ...] | None = None  # precisions that the system whose matrix this is supported


@dataclass(frozen=True)
class Choice:
    """Columns and places of the matrix, by their names in specs/."""

    precisions: tuple[str, ...]
    gpus: tuple[str, ...]
    toolchains: tuple[str, ...]


def parts_of(gpu: Gpu) -> list[Part]:
    """The products with a chip, in bytes and operations a second."""
    return [
        Part(
            name,
            board.memory * 1e9,
            board.bandwidth * 1e9,
            {math: rate * 1e12 for math, key in _RATES.items() if (rate := getattr(board, key)) is not None},
        )
        for name, board in gpu.parts.items()
    ]


def assemble(
    models: Sequence[Model],
    choice: Choice,
    emulated: Mapping[tuple[str, str], Mapping[str, Any]],
    records: Iterable[Record],
    command: str,
    title: str = "SpecRT precision matrix",
) -> Report:
    """The report; `emulated` has the numbers of each (model, precision) that was run here."""
    now = datetime.datetime.now(datetime.timezone.utc)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("openvino", "torch"))
    report = Report(
        title=title,
        about=f"{len(models)} models, {len(choice.precisions)} precisions, {len(choice.gpus)} GPU generations, "
        f"{len(choice.toolchains)} toolchains. A cell's level says how we know.",
        date=now.isoformat(timespec="seconds"),
        versions=f"specrt {specs.__version__}, {versions}, Python {platform.python_version()}",
        command=command,
        again="specrt validate {source} --precisions {precision} --gpus {gpu} --toolchains {toolchain} --out report",
    )
    recipes = {name: load_recipe(name) for name in choice.precisions}
    report.precisions = [_precision(recipe) for recipe in recipes.values()]
    report.gpus = [_gpu(load_gpu(name)) for name in choice.gpus]
    report.gpus.append({"name": CPU, "title": "this CPU", "parts": []})
    report.toolchains = [{"name": name, "title": name} for name in (*choice.toolchains, "openvino")]
    known = list(records)
    for model in models:
        published = _published(model)
        report.models.append(
            {
                "name": model.name, "title": model.title, "size": model.size, "source": _source(model),
                "context": published.limits.sequence if published is not None else 0, "had": model.had,
            }
        )  # fmt: skip
        for recipe in recipes.values():
            _add_numbers(report, model, recipe, emulated.get((model.name, recipe.name)), published, choice)
            _add_cells(report, model, recipe, choice, known)
    return report


def _add_numbers(
    report: Report,
    model: Model,
    recipe: Recipe,
    found: Mapping[str, Any] | None,
    published: Prepared | None,
    choice: Choice,
) -> None:
    numbers: dict[str, Any] = {}
    if found is not None and "error" not in found:
        numbers |= found
        numbers |= {"bound_kl": recipe.bound.mean_kl, "bound_relative": recipe.bound.relative}
    if published is not None:
        base = "fp16" if "fp16" in recipe.base else recipe.base[0]
        sizes = sizes_of(published.built.graph, published.graph, recipe, base)
        numbers |= {key: getattr(sizes, key) for key in ("weight_bytes", "kv_bytes_per_token", "bits_per_weight")}
        report.fits[f"{model.name}|{recipe.name}"] = _fits(sizes, published, choice)
    if numbers:
        report.numbers[f"{model.name}|{recipe.name}"] = numbers


def _fits(sizes: Sizes, published: Prepared, choice: Choice) -> dict[str, Any]:
    context = published.limits.sequence
    parts = [part for name in choice.gpus for part in parts_of(load_gpu(name))]
    return {part.name: asdict(fit(part, sizes.load, context)) for part in parts}


def within(numbers: Mapping[str, Any]) -> bool:
    """Whether what was emulated is a number within the recipe's bound; without words to predict, the relative error."""
    measure, bound = ("mean_kl", "bound_kl") if numbers.get("mean_kl") is not None else ("relative", "bound_relative")
    found = numbers.get(measure)
    return found is not None and found <= numbers[bound]


def _add_cells(report: Report, model: Model, recipe: Recipe, choice: Choice, records: Sequence[Record]) -> None:
    numbers = report.numbers.get(f"{model.name}|{recipe.name}", {})
    emulation = None
    if "subject" in numbers:
        emulation = len(report.evidence)
        report.evidence.append(Evidence("emulated", report.date[:10], report.versions, numbers["subject"]))
    for toolchain in (*choice.toolchains, "openvino"):
        data, lacking = load_toolchain(toolchain), None
        for gpu in choice.gpus if data.sm else (CPU,):
            decision = decide(recipe, data, load_gpu(gpu) if data.sm else None)
            if decision.alone and decision.works:  # other products without a kernel have an engine
                lacking = lacking or _lacking(model.subject, recipe, gpu, toolchain)
                decision = _forbidden(decision, lacking)
            spec = model.subject.source.stem
            mine = [record for record in records if record.concerns(spec, recipe.name, gpu, toolchain)]
            if decision.how == "kernel":  # a network, which is for any chip, says nothing of kernel steps
                mine = [record for record in mine if record.level != "emitted"]
            report.cells.append(_cell(report, model, decision, gpu, numbers, emulation, mine))


def _lacking(subject: Subject, recipe: Recipe, gpu: str, toolchain: str) -> Reason:
    """Whether kernels have all of a model, which has no engines there; for one chip as for another."""
    from compiler.lower.tensorrt.lowering import plan_of

    options = {**subject.options(), "precision": recipe.name, "target": gpu, "toolchain": toolchain}
    try:
        prepared = prepare(subject.source, **options)
        plan_of(prepared.lowered, prepared.options, prepared.request.architecture, prepared.request.pipeline_parallel)
    except SpecRTError as error:
        if error.code not in _LACKING:
            raise
        return Reason("kernels", error.message, ok=False)
    return Reason("kernels", "kernels have every operation of it")


def _forbidden(decision: Decision, reason: Reason) -> Decision:
    """The decision with a reason more, where that forbids it."""
    return decision if reason.ok else replace(decision, reasons=(*decision.reasons, reason), how=None)


def _cell(
    report: Report,
    model: Model,
    decision: Decision,
    gpu: str,
    numbers: Mapping[str, Any],
    emulation: int | None,
    records: Sequence[Record],
) -> Cell:
    place = (model.name, decision.recipe.name, gpu, decision.toolchain.name)
    refused = next((reason for reason in decision.reasons if not reason.ok), None)
    if refused is not None:
        return Cell(*place, "refused", refused.code, refused.text)
    reason = next((item for item in decision.reasons if item.code == "toolchain-product"), decision.reasons[-1])
    text = "; ".join([reason.text, *(f"but: {lint.text}" for lint in decision.lints)])
    level, evidence, stale = "declared", [], False
    if emulation is not None:
        evidence.append(emulation)
        if within(numbers):
            level = "executed" if gpu == CPU else "emulated"
        else:
            text += "; emulated, and further from float32 than the recipe's bound"
    for record in records:
        old = age(record, model.subject.source, decision.recipe)
        evidence.append(len(report.evidence))
        report.evidence.append(Evidence(record.level, record.date, record.versions, record.text, old))
        if level != "declared" and RANK[record.level] > RANK[level]:
            level, stale = record.level, bool(old)
    return Cell(*place, level, reason.code, text, tuple(evidence), stale)


def _published(model: Model) -> Prepared | None:
    if model.size is not None:
        return prepare(model.subject.source, size=model.size)
    return prepare(model.subject.source, checkpoint=model.subject.checkpoint)


def _source(model: Model) -> str:
    subject = model.subject
    return f"{subject.source}" + (f" --size {subject.size}" if subject.size else "")


def _precision(recipe: Recipe) -> dict[str, Any]:
    weights, inputs = recipe.weights, recipe.activations
    stored = "weights as they are" if weights is None else f"weights {weights.type}, a scale per {weights.per}"
    told = "" if inputs is None else f", inputs {inputs.type} per {inputs.per}, {inputs.mode}"
    return {"name": recipe.name, "title": recipe.name, "meaning": f"{stored}{told}; products in {recipe.compute}"}


def _gpu(gpu: Gpu) -> dict[str, Any]:
    boards = [
        {"name": name, "title": name.upper(), "memory_gb": board.memory, "bandwidth_gb_s": board.bandwidth}
        for name, board in gpu.parts.items()
    ]
    return {"name": f"sm{gpu.sm}", "title": f"SM{gpu.sm}", "parts": boards}
