"""A deployment spec: YAML that says what to compile for what, with one key for every flag of `compile`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field

from specs.errors import SpecRTError
from specs.fields import Float, Sequence, Texts
from specs.node import Node, Text
from specs.yaml_loader import Scalar, load_yaml, plain

VERSION = 1


def _scalar(node: object) -> object:
    return plain(node) if isinstance(node, Scalar) else node


Bool = Annotated[bool, BeforeValidator(_scalar), Field(strict=True)]
Int = Annotated[int, BeforeValidator(_scalar), Field(strict=True)]


class Limits(Node):
    """How much one bundle serves at once."""

    title: ClassVar[str] = "`limits`"
    max_batch: Int | None = Field(None, description="sequences served at once")
    max_sequence: Int | None = Field(None, description="longest sequence, prompt and new tokens together")


class Parallel(Node):
    """How many GPUs of one host share a model."""

    title: ClassVar[str] = "`parallel`"
    tensor: Int | None = Field(None, description="GPUs that share each product; left out: 1")
    pipeline: Int | None = Field(None, description="stages of neighbouring layers, one after the other; left out: 1")


class Build(Node):
    """How engines for a GPU are built; none of it changes what they compute."""

    title: ClassVar[str] = "`build`"
    level: Int | None = Field(None, description="effort of the builder, 0 to 5; left out: 2")
    workspace_mib: Int | None = Field(None, description="limit of scratch memory; left out: the whole device")
    hardware: Text | None = Field(
        None, description="GPUs that a plan runs on: this, ampere_plus, same_capability; left out: this"
    )
    version_compatible: Bool | None = Field(
        None, description="plans also for later TensorRT of the same major version; left out: no"
    )
    weight_streaming: Bool | None = Field(
        None, description="baked weights stay in host memory, from tensorrt-10.0 on; left out: no"
    )
    weights: Text | None = Field(
        None, description="inputs: one engine for all equal layers; baked: engines that stand alone; left out: inputs"
    )
    attention: Text | None = Field(
        None,
        description="kernels: ours, between engines, over a paged cache; native: TensorRT's layers, a decoder in one "
        "engine with a linear cache, from tensorrt-10.16 on; left out: kernels",
    )

    segments: Text | None = Field(
        None,
        description="what runs between attentions: engines, TensorRT's; kernels, ours in 16 bits, without any TensorRT "
        "and slower for many tokens; left out: engines, where they have the precision, but for fp16 with tensorrt-8.6, "
        "whose engines add in float16, kernels where they know the model",
    )

    def given(self) -> tuple[tuple[str, object], ...]:
        """The keys that are there, with their values."""
        names = [name for name in type(self).model_fields if name != "where"]
        return tuple((name, value) for name in names if (value := getattr(self, name)) is not None)


class Layers(Node):
    """Linears with a precision of their own; the first entry that names one counts."""

    title: ClassVar[str] = "an entry of `layers`"
    linears: Texts = Field(description="patterns over our names: `*.down`, or with the layer: `layers.0.attn.q`")
    precision: Text = Field(description="a recipe's name; the base precision leaves them alone")


class Gates(Node):
    """How far the compiled model may be from float32; on a miss, linears stay in the base precision until it holds."""

    title: ClassVar[str] = "`gates`"
    mean_kl: Float | None = Field(None, description="mean KL divergence of the next-token distributions, nats")
    perplexity: Float | None = Field(None, description="how much more, as a share: 0.01 is 1 %; needs `text`")
    top1: Float | None = Field(None, description="least share of tokens whose likeliest successor is the same")
    text: Text | None = Field(None, description="what they are measured on: a text, or ids in a .npy; else random ids")


class Deployment(Node):
    """What to compile, for which target, within which limits; paths are relative to the file."""

    title: ClassVar[str] = "a deployment spec"
    deployment: Int = Field(description=f"version of this schema: {VERSION}")
    model: Text | None = Field(None, description="an architecture file; left out: found by config.json")
    size: Text | None = Field(None, description="one of the architecture's `sizes`")
    checkpoint: Text | None = Field(None, description="a checkpoint folder")
    target: Text | None = Field(None, description="cpu, or a GPU's architecture: sm90")
    toolchain: Text | None = Field(None, description="tensorrt-8.6, tensorrt-10.8, ...; left out: the installed one")
    build: Build | None = None
    precision: Text | None = Field(
        None,
        description="a recipe's name, a recipe file, or checkpoint: low-bit weights as they are; left out: so, or fp32",
    )
    kv_cache: Text | None = Field(None, description="int8 or fp8; left out: as the precision says")
    layers: Annotated[tuple[Layers, ...], Sequence] = Field((), description="linears with a precision of their own")
    gates: Gates | None = None
    calibration: Text | None = Field(None, description="a .npy file of token ids, or a text file")
    weights: Text | None = Field(None, description="checkpoint, or random")
    seed: Int | None = Field(None, description="seed of random weights")
    limits: Limits | None = None
    parallel: Parallel | None = None
    out: Text | None = Field(None, description="the bundle's directory")


def is_deployment(path: Path) -> bool:
    """Whether a YAML file has the key `deployment` at its top; raises SpecRTError SPEC-0xx for text that is no YAML."""
    node = load_yaml(path)
    return "deployment" in node


def load_deployment(path: Path) -> Deployment:
    """Read a deployment spec; raises SpecRTError SPEC-004 to SPEC-006 for keys, SPEC-065 for its version or content."""
    deployment = Deployment.model_validate(load_yaml(path))
    if deployment.deployment != VERSION:
        message = f"deployment version {deployment.deployment}, expected {VERSION}"
        raise SpecRTError("SPEC-065", message, where=deployment.where)
    if deployment.model is None and deployment.checkpoint is None:
        raise SpecRTError("SPEC-065", "a deployment names a `model`, a `checkpoint` or both", where=deployment.where)
    return deployment
