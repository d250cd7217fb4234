"""The schemas of GPUs (specs/gpus/*.yaml) and toolchains (specs/toolchains/*.yaml): what they can, as data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from specs.errors import SpecRTError
from specs.fields import Float, Numbers, Sequence, Texts, Word
from specs.node import Bool, Int, Node, Text
from specs.yaml_loader import load_yaml

VERSION = 1
HERE = Path(__file__).parent

Math = Annotated[Literal["native", "weights", "slow", "none"], Word]


class Rates(Node):
    """How products of each type are computed: `weights` is stored only, multiplied in 16 bits; `slow` works, badly."""

    title: ClassVar[str] = "`math`"
    fp32: Math
    tf32: Math
    fp16: Math
    bf16: Math
    fp8: Math
    int8: Math
    int4: Math
    nvfp4: Math
    mxfp8: Math
    mxfp4: Math


class Hazard(Node):
    """Something that works and surprises."""

    title: ClassVar[str] = "an entry of `hazards`"
    math: Texts = Field(description="the types of products that it concerns")
    text: Text = Field(description="what happens")


class Board(Node):
    """One product with this chip: GB, GB/s, dense TFLOP/s or TOP/s."""

    title: ClassVar[str] = "a part"
    memory: Int = Field(description="GB")
    bandwidth: Int = Field(description="GB/s")
    tf32: Float | None = None
    fp16: Float | None = Field(None, description="also the rate of bf16, where the chip has it")
    fp8: Float | None = None
    int8: Float | None = None
    fp4: Float | None = None
    source: Text = Field(description="where the numbers come from")
    device: Text | None = Field(None, description="the name that its driver gives")


class Gpu(Node):
    """One compute capability."""

    title: ClassVar[str] = "a GPU file"
    gpu: Int = Field(description=f"version of this schema: {VERSION}")
    sm: Int = Field(description="compute capability: 90 for SM90")
    source: Text
    math: Rates
    fp8_storage: Annotated[Literal["native", "convert", "none"], Word] = Field(
        description="FP8 in the KV cache: as is, or converted on read"
    )
    hazards: Annotated[tuple[Hazard, ...], Sequence] = ()
    parts: dict[str, Board]


class Product(Node):
    """How a toolchain runs a product of quantized operands; the first entry that fits a recipe counts."""

    title: ClassVar[str] = "an entry of `products`"
    weights: Texts = Field(description="element types of the weight")
    activations: Text | None = Field(None, description="element type of the input; left out: not quantized")
    mode: Annotated[Literal["static", "dynamic"], Word] | None = Field(None, description="left out: both")
    per: Text | None = Field(None, description="what shares the input's scale; left out: anything")
    block: Int | None = Field(None, description="inputs that share a scale")
    how: Annotated[Literal["native", "kernel", "widen", "emulate"], Word] = Field(
        description="its own kernel, a kernel step of ours, weights widened when loaded, rounding in float32"
    )
    sm: Numbers = Field((), description="the chips with it; left out: all that the toolchain runs on")
    math: Annotated[Literal["base", "fp8"], Word] | None = Field(
        None, description="what a kernel multiplies in where the recipe's own is missing: its numbers are exact there"
    )
    baked: Bool = Field(
        False, description="native for engines that hold their weights (`build: {weights: baked}`), else a kernel step"
    )
    note: Text = Field(description="said by explain")


class Held(Node):
    """How a toolchain keeps a KV cache of 8 bits."""

    title: ClassVar[str] = "an entry of `kv_cache`"
    how: Annotated[Literal["native", "kernel", "emulate"], Word] = Field(
        description="codes read by the toolchain, by a kernel step of ours, or rounded and kept wide"
    )
    note: Text = Field(description="said by explain")


class Kernels(Node):
    """What engines of a toolchain are spared or can't do."""

    title: ClassVar[str] = "`norms`, or an entry of `segments` or `prefer`"
    how: Annotated[Literal["kernel"], Word] = Field(description="a kernel step of ours, between engines")
    sm: Numbers = Field((), description="compute capabilities that it is said of; left out: all")
    note: Text = Field(description="why")


class Toolchain(Node):
    """One version line of an engine builder."""

    title: ClassVar[str] = "a toolchain file"
    toolchain: Int = Field(description=f"version of this schema: {VERSION}")
    name: Text = Field(description="the file's name")
    engine: Annotated[Literal["tensorrt", "openvino"], Word]
    version: Text
    source: Text
    sm: Numbers = Field((), description="compute capabilities; none for a CPU")
    base: Texts = Field(description="precisions of what is not quantized, all that it can run")
    types: Texts = Field(description="element types that a network can have")
    layers: Texts = Field((), description="native layers beyond products and elementwise operations")
    kv_cache: dict[str, Held] = Field(default_factory=dict, description="8-bit KV caches by name: int8, fp8")
    norms: Kernels | None = Field(None, description="norms of whole rows; left out: the engine's own")
    segments: dict[str, Kernels] = Field(
        default_factory=dict, description="base precisions that no engine of it has, by name"
    )
    prefer: dict[str, Kernels] = Field(
        default_factory=dict,
        description="base precisions whose segments are kernels where those know all of a model, by name",
    )
    products: Annotated[tuple[Product, ...], Sequence] = ()

    def preferred(self, base: str | None, sm: int) -> Kernels | None:
        """What says that segments in a base precision are rather kernels on a compute capability, if anything does."""
        found = self.prefer.get(str(base))
        return found if found is not None and (not found.sm or sm in found.sm) else None


@dataclass(frozen=True)
class Operands:
    """What meets in a product: types of the weight and of a rounded input, and how the input gets its scale."""

    weights: str
    activations: str | None = None
    mode: str | None = None
    per: str | None = None
    block: int | None = None


def product_of(toolchain: Toolchain, operands: Operands, sm: int | None) -> Product | None:
    """The toolchain's first way to run a product on a chip (None: the CPU), None where it has none."""
    return next((entry for entry in toolchain.products if _fits(entry, operands, sm)), None)


def maths_of(toolchain: Toolchain, operands: Operands) -> set[str]:
    """What kernels multiply such a product in, on any chip, instead of the recipe's own."""
    return {entry.math for entry in toolchain.products if entry.math is not None and _fits(entry, operands, None)}


def _fits(entry: Product, operands: Operands, sm: int | None) -> bool:
    if operands.weights not in entry.weights or (entry.sm and sm is not None and sm not in entry.sm):
        return False
    if operands.activations is None or entry.activations is None:
        return (operands.activations is None) == (entry.activations is None)
    return (
        entry.activations == operands.activations
        and entry.mode in (None, operands.mode)
        and entry.per in (None, operands.per)
        and entry.block in (None, operands.block)
    )


@lru_cache(maxsize=64)
def load_gpu(name: str) -> Gpu:
    """A GPU by `sm90`, or by a part's name; raises SpecRTError PREC-003 for another, SPEC-0xx for a wrong file."""
    if (path := HERE / "gpus" / f"{name}.yaml").is_file():
        return _gpu(path)
    for known in gpu_names():
        if name in (gpu := load_gpu(known)).parts:
            return gpu
    raise SpecRTError("PREC-003", f"unknown GPU `{name}`", hint=f"known: {', '.join(gpu_names())}, and their parts")


def _gpu(path: Path) -> Gpu:
    gpu: Gpu = Gpu.model_validate(load_yaml(path))
    if gpu.gpu != VERSION or f"sm{gpu.sm}" != path.stem:
        raise SpecRTError(
            "PREC-002", f"`{path.name}` must be of schema {VERSION} and say `sm: {path.stem[2:]}`", where=gpu.where
        )
    return gpu


def part_of_device(name: str) -> tuple[str, Board] | None:
    """The part whose driver gives this name; None where no file has it."""
    for known in gpu_names():
        for part, board in load_gpu(known).parts.items():
            if board.device == name:
                return part, board
    return None


def gpu_names() -> tuple[str, ...]:
    """`sm70` and up, in order."""
    return tuple(sorted((path.stem for path in (HERE / "gpus").glob("sm*.yaml")), key=lambda name: int(name[2:])))


@lru_cache(maxsize=64)
def load_toolchain(name: str) -> Toolchain:
    """A toolchain by name; raises SpecRTError PREC-003 for another, SPEC-0xx for a wrong file."""
    path = HERE / "toolchains" / f"{name}.yaml"
    if not path.is_file():
        raise SpecRTError("PREC-003", f"unknown toolchain `{name}`", hint=f"known: {', '.join(toolchain_names())}")
    toolchain: Toolchain = Toolchain.model_validate(load_yaml(path))
    if toolchain.toolchain != VERSION or toolchain.name != path.stem:
        message = f"`{path.name}` must be of schema {VERSION} and say `name: {path.stem}`"
        raise SpecRTError("PREC-002", message, where=toolchain.where)
    return toolchain


def toolchain_names() -> tuple[str, ...]:
    """Every toolchain, sorted by engine and version."""

    def key(name: str) -> tuple[str, tuple[int, ...]]:
        engine, _, version = name.partition("-")
        return engine, tuple(int(part) for part in version.split(".") if part)

    return tuple(sorted((path.stem for path in (HERE / "toolchains").glob("*.yaml")), key=key))
