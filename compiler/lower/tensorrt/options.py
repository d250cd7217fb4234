"""What a builder of engines is told: the keys of `build:` in a deployment, with their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from compiler.lower.tensorrt.dialects import DEFAULT, dialect
from specs.errors import SpecRTError
from specs.hardware import load_toolchain

HARDWARE = {"this": "NONE", "ampere_plus": "AMPERE_PLUS", "same_capability": "SAME_COMPUTE_CAPABILITY"}
WEIGHTS = ("inputs", "baked")
ATTENTION = ("kernels", "native")
SEGMENTS = ("engines", "kernels")


@dataclass(frozen=True)
class BuildOptions:
    """`level` 2 builds in seconds and is as fast as 3 here (docs/decisions.md); other defaults are TensorRT's own."""

    toolchain: str = DEFAULT
    level: int = 2  # builder_optimization_level, 0 to 5
    workspace_mib: int | None = None  # limit of scratch memory; None: the whole device
    hardware: str = "this"  # which GPUs a plan runs on: this, ampere_plus, same_capability
    version_compatible: bool = False  # plans for later TensorRT of the same major version
    weight_streaming: bool = False  # baked weights stay on the host; from 10.0
    weights: str = "inputs"  # one engine for all equal layers; baked: engines that stand alone
    attention: str = "kernels"  # our kernels between engines; native: TensorRT's layers, one engine for a decoder
    segments: str | None = None  # engines, or kernels: programs of ours for all; None: as the toolchain's file says
    tf32: bool = False  # engines may multiply float32 in TF32: set by the precision, no key of a deployment

    @property
    def alone(self) -> bool:
        """Whether no segment is an engine's."""
        return self.segments == "kernels"

    @property
    def native(self) -> bool:
        """Whether a decoder is one engine with TensorRT's own attention and cache."""
        return self.attention == "native"

    def as_dict(self) -> dict[str, Any]:
        """The `build` of plan.json."""
        return asdict(self)


def asked_options(given: Mapping[str, Any], gpus: int = 1) -> BuildOptions:
    """Options from a request, whose precision says what is left; several GPUs share what lies between engines.

    Raises SpecRTError LOWER-033 as `read_options`.
    """
    if "tf32" in given:
        raise _wrong("`tf32` is no build option of a request", "it is a precision: `precision: tf32`")
    options = read_options(given)
    for name, asked, one in (("attention", options.attention, "native"), ("weights", options.weights, "baked")):
        if gpus > 1 and asked == one:
            message = f"with `{name}: {one}` a model is on one GPU, {gpus} GPUs are asked for"
            raise _wrong(message, f"leave out `{name}`, or `parallel`")
    return options


def for_base(options: BuildOptions, base: str) -> BuildOptions:
    """Options for a base precision: TF32 where it is that, kernels alone where no engine has it.

    Raises SpecRTError LOWER-033 where the options want engines for it.
    """
    segments = options.segments
    if base in load_toolchain(options.toolchain).segments:
        if segments == "engines":
            raise _wrong(f"no engine of {options.toolchain} has {base}", "leave out `segments`, or choose fp16 or fp32")
        segments = "kernels"
    return _one_way(replace(options, tf32=base == "tf32", segments=segments))


def read_options(given: Mapping[str, Any]) -> BuildOptions:
    """Options from plan.json. Raises SpecRTError LOWER-033 for what no version takes, or this."""
    known = {field.name: field for field in fields(BuildOptions)}
    if unknown := sorted(set(given) - set(known)):
        raise _wrong(
            f"there is no build option `{unknown[0]}`", f"known: {', '.join(name for name in known if name != 'tf32')}"
        )
    options = BuildOptions(**given)
    line = dialect(options.toolchain)
    if isinstance(options.level, bool) or not isinstance(options.level, int) or not 0 <= options.level <= 5:
        raise _wrong(f"`level` is {options.level!r}", "the builder's levels are 0 to 5, from quick to thorough")
    if options.hardware not in HARDWARE:
        raise _wrong(f"`hardware` is `{options.hardware}`", f"known: {', '.join(HARDWARE)}")
    if options.weights not in WEIGHTS:
        raise _wrong(f"`weights` of a build is `{options.weights}`", f"known: {', '.join(WEIGHTS)}")
    if options.attention not in ATTENTION:
        raise _wrong(f"`attention` of a build is `{options.attention}`", f"known: {', '.join(ATTENTION)}")
    if options.segments is not None and options.segments not in SEGMENTS:
        raise _wrong(f"`segments` of a build is `{options.segments}`", f"known: {', '.join(SEGMENTS)}")
    if options.native and line.attention is None:
        raise _wrong(f"{line.toolchain} has no `attention: native`", "tensorrt-10.16 and later have its layers")
    if options.workspace_mib is not None and options.workspace_mib < 1:
        raise _wrong(f"`workspace_mib` is {options.workspace_mib}", "give 1 or more, or leave it out")
    if options.hardware == "same_capability" and "SAME_COMPUTE_CAPABILITY" not in line.hardware:
        raise _wrong(f"{line.toolchain} has no `hardware: same_capability`", "tensorrt-10.16 and later have it")
    if options.weight_streaming and not line.strong:
        raise _wrong(f"{line.toolchain} has no weight streaming", "tensorrt-10.0 and later have it")
    if options.weight_streaming and options.weights != "baked":
        raise _wrong("weight streaming is for baked weights", "with `weights: inputs` an engine has none to stream")
    return _one_way(options)


def _one_way(options: BuildOptions) -> BuildOptions:
    for name, asked, other in (("weights", options.weights, "baked"), ("attention", options.attention, "native")):
        if options.alone and asked == other:
            message = f"`{name}: {asked}` is said of engines, and every segment is a program of kernels"
            raise _wrong(
                message, "leave it out; or `segments: engines`, in a precision that engines have: fp16 or fp32"
            )
    return options


def _wrong(message: str, hint: str) -> SpecRTError:
    return SpecRTError("LOWER-033", message, hint=hint)
