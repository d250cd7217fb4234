"""Why a model becomes what it becomes: choices, what passes did and refused, the backend's answers.

Everything is data, for `specrt explain` and for reports; no weight is read and no engine is built.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compiler.api import Prepared
from compiler.passes.quantization_plan import QuantizationPlan
from compiler.precision.lints import lints
from compiler.sizes import cache_bytes_per_token, counted, sizes
from specs.errors import SpecRTError

if TYPE_CHECKING:
    from compiler.lower.capability import Judge
    from compiler.lower.plan import Plan


@dataclass(frozen=True)
class Fact:
    """One sentence about a choice, and the place that decided it."""

    subject: str
    text: str
    where: str | None = None


@dataclass(frozen=True)
class PassStory:
    """What one pass did: hits and refusals with `rule`, `at` and `where`, refusals also with `reason`."""

    name: str
    hits: tuple[dict[str, Any], ...]
    refusals: tuple[dict[str, Any], ...]
    equations_before: int
    equations_after: int


@dataclass(frozen=True)
class OperationStory:
    """An operation of the final graph with the types it is used with, how often it runs, and the backend's answer."""

    op: str
    dtypes: tuple[str, ...]
    times: int
    answer: str  # emit, decompose or unsupported
    reason: str
    where: str | None


@dataclass(frozen=True)
class Explanation:
    """All of it."""

    name: str
    target: str
    precision: str
    role: str
    facts: tuple[Fact, ...]
    passes: tuple[PassStory, ...]
    operations: tuple[OperationStory, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def explain(prepared: Prepared) -> Explanation:
    """Everything about a prepared model, for the target and precision that it was prepared for."""
    return Explanation(
        prepared.source.label,
        prepared.request.target,
        prepared.precision.recipe.name,
        prepared.role,
        (
            _spec_fact(prepared),
            _role_fact(prepared),
            *_precision_facts(prepared),
            _cache_fact(prepared),
            *_engine_facts(prepared),
        ),
        tuple(
            PassStory(
                report.name,
                _grouped([hit.as_dict() for hit in report.hits]),
                _grouped([refusal.as_dict() for refusal in report.refusals]),
                report.equations_before,
                report.equations_after,
            )
            for report in (*prepared.reports, *(() if prepared.split is None else (prepared.split,)))
        ),
        _operations(prepared),
    )


def _grouped(events: list[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Events that differ by the value only, told once with `times`: nobody reads sixty casts of one line."""
    found: dict[tuple[object, ...], dict[str, Any]] = {}
    for event in events:
        key = (event["rule"], event["where"], event.get("reason"))
        if key in found:
            found[key]["times"] += 1
        else:
            found[key] = {**event, "times": 1}
    return tuple(found.values())


# -- facts ----------------------------------------------------------------------------------------------------------


def _spec_fact(prepared: Prepared) -> Fact:
    source = prepared.source
    spec = source.spec
    file = Path(spec.where.file).name
    if source.checkpoint is None:
        return Fact("spec", f"`{spec.name}`, given, in its size `{prepared.request.size}`", _place(spec.where))
    if prepared.request.source.is_file():
        return Fact("spec", f"`{spec.name}` from {file}, named in the request", _place(spec.where))
    config = source.checkpoint.config
    key = "model_type" if "model_type" in config else "architecture"
    text = f"`{spec.name}`: config.json says `{key}: {config.get(key)}`, matched here"
    return Fact("spec", text, _place(spec.match.where))


def _role_fact(prepared: Prepared) -> Fact:
    from specs.parts import ATTENTIONS

    spec = prepared.source.spec
    env = {**prepared.source.config, "layer": 0}
    masks = {name: part.choice("mask", env) for name, part in spec.parts.items() if isinstance(part, ATTENTIONS)}
    told = ", ".join(f"`{name}` has mask `{mask}`" for name, mask in masks.items()) or "it has no attention"
    if prepared.role == "encoder":
        return Fact(
            "role", f"encoder, because {told}: every token sees every other, so there is no cache to go on from"
        )
    where = next((_place(part.where) for part in spec.parts.values() if isinstance(part, ATTENTIONS)), None)
    kind = "linear" if prepared.precision.native else "paged"
    return Fact("role", f"decoder, because {told}: it goes on token by token from a {kind} KV cache", where)


def _precision_facts(prepared: Prepared) -> tuple[Fact, ...]:
    chosen = prepared.precision
    base, recipe = chosen.base, chosen.recipe
    halves = base == "bf16" or prepared.request.on_gpu
    told = _BASES[base] if base in ("fp32", "tf32") else _HALVES.format(base) if halves else _BASES[base]
    if recipe.kv_cache is not None:
        told = told.replace("activations and cache", "activations (for the cache see below)").replace(", cache)", ")")
    facts = [Fact("precision", f"{recipe.name}: {told}", _place(recipe.where))]
    skipped = ("base", "hazard") if recipe.weights is not None else ("base", "hazard", "toolchain-gpu")
    if recipe.weights is not None or recipe.kv_cache is not None:
        facts += [Fact(reason.code, reason.text) for reason in chosen.decision.reasons if reason.code not in skipped]
    if chosen.decision.alone:
        facts += [Fact(reason.code, reason.text) for reason in chosen.decision.reasons if reason.code == "base"]
    gpu, toolchain = chosen.decision.gpu, chosen.decision.toolchain
    if gpu is not None and (preferred := toolchain.preferred(base, gpu.sm)) is not None:
        facts.append(Fact("segments", f"{'kernels' if prepared.options.alone else 'engines'}: {preferred.note}"))
    if chosen.plan is not None:
        facts += [Fact("quantized", text) for text in _quantized(chosen.plan)]
    facts += [Fact("beware", lint.text) for lint in lints(prepared)]
    checkpoint = prepared.source.checkpoint
    if checkpoint is not None:
        stored = sorted({tensor.dtype for tensor in checkpoint.tensors.values()})
        facts.append(Fact("weights", f"stored as {', '.join(stored)} in the checkpoint, computed with in {base}"))
    return tuple(facts)


_HALVES = (
    "weights, activations and cache are {}; norm statistics, rotary tables, softmax and logits stay float32, where 16 "
    "bits lose too much"
)
_BASES = {
    "fp32": "what is not quantized (weights, activations, cache) is float32, which the model's numbers are checked in",
    "tf32": "what is not quantized (weights, activations, cache) is float32; engines may multiply it in TF32, 10 bits "
    "of fraction and float32's range; attention over a cache, which kernels of ours compute, stays float32",
    "fp16": "matrices are stored in float16 and widened when loaded; arithmetic, activations and cache are float32",
}


def _quantized(plan: QuantizationPlan) -> list[str]:
    """Which linears became what, those of one kind together."""
    from compiler.passes.quantization_plan import leaf_of

    groups: dict[str, dict[str, int]] = {}
    for linear in plan.linears.values():
        store = linear.storage
        shared = f"{store.block[-1]} inputs" if store.block else "an output" if store.scale_shape[-2] > 1 else "all"
        text = f"{linear.recipe.name}: {store.type}, a scale of {store.scale} for {shared}"
        leaves = groups.setdefault(text + (" and a zero" if store.zero else ""), {})
        leaf = leaf_of(linear.weight)
        leaves[leaf] = leaves.get(leaf, 0) + 1
    told = [f"{text}: {', '.join(f'{leaf} x {n}' for leaf, n in leaves.items())}" for text, leaves in groups.items()]
    kept: dict[str, list[str]] = {}
    for name, why in plan.kept.items():
        kept.setdefault(why, []).append(leaf_of(name))
    return told + [f"not {', '.join(dict.fromkeys(leaves))}: {why}" for why, leaves in kept.items()]


def _cache_fact(prepared: Prepared) -> Fact:
    size = sizes(prepared)
    limits = prepared.limits
    if not size.cache_bytes_per_token:
        return Fact("cache", "none")
    told = "given" if prepared.request.max_sequence else "the longest that the model states, or the default"
    text = (
        f"{size.cache_bytes_per_token:,} bytes a token; {limits.batch} sequences of {limits.sequence} tokens ({told}) "
        f"take {size.cache_bytes_max / 1e6:,.1f} MB"
    )
    return Fact("cache", text)


def _engine_facts(prepared: Prepared) -> tuple[Fact, ...]:
    """How the graph would be cut for a GPU; nothing where an operation keeps it from being."""
    if not prepared.request.on_gpu:
        return ()
    from compiler.lower.pipeline import stage_text
    from compiler.lower.tensorrt.lowering import plan_of

    options = prepared.options
    try:
        plan = plan_of(prepared.lowered, options, prepared.request.architecture, prepared.request.pipeline_parallel)[1]
    except SpecRTError as error:
        return (Fact("engines", error.message, _place(error.where)),)
    if options.native:
        over = " over a linear cache" if prepared.role == "decoder" else ""
        text = (
            f"{options.toolchain}: one engine, with TensorRT's own attention{over}; "
            f"{len(plan.profiles)} profiles; weights are {options.weights}"
        )
        return (Fact("engines", text),)
    calls = {kind: [step.file for step in plan.steps if step.kind == kind] for kind in ("engine", "program", "kernel")}
    programs = f"{len(calls['program'])} calls of {len(set(calls['program']))} distinct programs of kernels, "
    text = (
        f"{options.toolchain}: {len(calls['engine'])} engine calls of {len(set(calls['engine']))} distinct engines, "
        f"{programs if calls['program'] else ''}{len(calls['kernel'])} attention kernels between them; "
        f"{len(plan.profiles)} profiles; weights are {options.weights}"
    )
    stages = (Fact("stages", stage_text(plan)),) if len(plan.stages) > 1 else ()
    return (Fact("engines", text), *_rank_facts(prepared, plan), *stages)


def _rank_facts(prepared: Prepared, plan: Plan) -> tuple[Fact, ...]:
    """What GPUs that share each product have of it, and what they exchange; nothing where there is one."""
    report, count = prepared.split, prepared.request.tensor_parallel
    if report is None:
        return ()
    told = {rule: ", ".join(dict.fromkeys(_leaf(hit.at) for hit in report.hits if hit.rule == rule)) for rule in _SPLIT}
    split = "; ".join(f"{_SPLIT[rule]}: {names}" for rule, names in told.items() if names)
    reasons: dict[str, list[str]] = {}
    for refusal in report.refusals:
        reasons.setdefault(_leaf(refusal.reason), []).append(_leaf(refusal.at))
    facts = [Fact("tensor", f"{count} GPUs share each product; {split}")]
    facts += [Fact("whole", f"{', '.join(dict.fromkeys(names))}: {why}") for why, names in reasons.items()]
    held, size = sum(weight.bytes for weight in plan.weights.values()), sizes(prepared)
    steps = Counter(step.name for step in plan.steps if step.kind == "collective")
    exchanged = " and ".join(f"{number} {name}" for name, number in steps.items())
    cache = cache_bytes_per_token(prepared.ranks[0])
    text = (
        f"{held / 1e6:,.1f} MB of {size.weight_bytes / 1e6:,.1f} MB of weights and {cache:,} of "
        f"{size.cache_bytes_per_token:,} bytes of cache a token are a rank's; a step has {exchanged}"
    )
    return (*facts, Fact("ranks", text))


_SPLIT = {  # the rules of split_tensors
    "columns": "by outputs",
    "rows": "by inputs, then added up",
    "heads": "by heads",
    "heads_with_copies": "by heads, those of keys and values in copies",
}


def _leaf(text: str) -> str:
    """A value's name, or a text that has one, without layer and number: `layers.5.attn.q.2` is `attn.q`."""
    return re.sub(r"\blayers\.\d+\.|(?<=\w)\.\d+\b", "", text)


def _place(where: object) -> str | None:
    return None if where is None else str(where)


# -- operations -----------------------------------------------------------------------------------------------------


def _judge(prepared: Prepared) -> Judge:
    if prepared.request.on_gpu:
        from compiler.lower.tensorrt.lowering import judge_of

        return judge_of(prepared.lowered, prepared.options, prepared.request.architecture)
    from compiler.lower.openvino import verdict as on_cpu

    return on_cpu


def _operations(prepared: Prepared) -> tuple[OperationStory, ...]:
    """One row for each operation and answer, in the graph's order."""
    from compiler.lower.capability import Decompose, Emit, key_dtype

    judge = _judge(prepared)

    rows: dict[tuple[str, str, str], tuple[list[str], int, str | None]] = {}
    for equation, times in counted(prepared.lowered.equations):
        verdict = judge(equation)
        if isinstance(verdict, Emit):
            answer, reason = "emit", verdict.note
        elif isinstance(verdict, Decompose):
            answer, reason = "decompose", verdict.rule
        else:
            answer, reason = "unsupported", verdict.reason
        key = (equation.op, answer, reason)
        dtypes, before, where = rows.get(key, ([], 0, _place(equation.where)))
        dtype = key_dtype(equation)
        rows[key] = (dtypes if dtype in dtypes else [*dtypes, dtype], before + times, where)
    return tuple(
        OperationStory(op, tuple(dtypes), times, answer, reason, where)
        for (op, answer, reason), (dtypes, times, where) in rows.items()
    )
