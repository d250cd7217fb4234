"""What differs between versions of TensorRT, as data: types, typing, and which layers there are.

Facts: the recorded Python API of each version (tests/data/tensorrt_api), and its documentation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from specs.errors import SpecRTError

# IR element type -> TensorRT's name of it.
DATA_TYPES = {
    "f32": "FLOAT", "f16": "HALF", "bf16": "BF16", "i32": "INT32", "i64": "INT64", "i8": "INT8", "bool": "BOOL",
    "f8e4m3": "FP8", "i4": "INT4", "f4e2m1": "FP4", "f8e8m0": "E8M0",
}  # fmt: skip


@dataclass(frozen=True)
class Dialect:
    """One line of TensorRT versions."""

    version: str  # the first of the line: 10.8
    strong: bool  # a layer's output types follow from its inputs, casts are explicit
    flags: tuple[str, ...]  # of create_network
    dtypes: frozenset[str]
    shape_dtype: str  # of what add_shape gives
    gelu: bool  # activation GELU_ERF and GELU_TANH
    normalization: str | None  # the method for layer norm
    rotary: bool  # add_rotary_embedding
    attention: str | None  # the method for attention; from it on there is add_kv_cache_update too
    hardware: tuple[str, ...]  # levels of HardwareCompatibilityLevel beside NONE
    gpus: tuple[int, int]  # oldest and newest compute capability that its library runs on

    @property
    def toolchain(self) -> str:
        """The name that a user gives: tensorrt-10.8."""
        return f"tensorrt-{self.version}"


_8 = frozenset({"f32", "f16", "i32", "i8", "bool"})
_10 = _8 | {"bf16", "i64", "f8e4m3", "i4"}
_10_8 = _10 | {"f4e2m1"}
_10_16 = _10_8 | {"f8e8m0"}
_STRONG = ("STRONGLY_TYPED",)
_AMPERE = ("AMPERE_PLUS",)
_BOTH = ("AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY")
# 8.6 names FP8 too and refuses to build it. It has add_normalization; there the norm is written out, with float32
# statistics in a float16 network.
DIALECTS = (
    Dialect("8.6", False, ("EXPLICIT_BATCH",), _8, "i32", False, None, False, None, _AMPERE, (70, 90)),
    Dialect("10.0", True, _STRONG, _10, "i64", True, "add_normalization", False, None, _AMPERE, (70, 90)),
    Dialect("10.8", True, _STRONG, _10_8, "i64", True, "add_normalization", False, None, _AMPERE, (75, 120)),
    Dialect(
        "10.16", True, _STRONG, _10_16, "i64", True, "add_normalization_v2", True, "add_attention", _BOTH, (75, 120)
    ),
    Dialect(
        "11.4", True, _STRONG, _10_16, "i64", True, "add_normalization_v2", True, "add_attention_v2", _BOTH, (75, 120)
    ),
)
TOOLCHAINS = tuple(item.toolchain for item in DIALECTS)
DEFAULT = "tensorrt-8.6"  # where TensorRT is not installed and nothing is said: the line that was executed for real


def dialect(version: str) -> Dialect:
    """The dialect of an exact version (`10.3.0.26`) or of a toolchain's name (`tensorrt-10.3`): the newest not newer.

    Raises SpecRTError LOWER-030 for a version before the first, and for text that is no version.
    """
    found = re.match(r"(?:tensorrt-)?(\d+)\.(\d+)", version)
    given = (int(found[1]), int(found[2])) if found else (0, 0)
    lines = [item for item in DIALECTS if _number(item.version) <= given]
    if not lines:
        message = f"TensorRT `{version}` is not supported"
        raise SpecRTError("LOWER-030", message, hint=f"known: {', '.join(TOOLCHAINS)}, and versions between and after")
    return lines[-1]


def _number(version: str) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)


def installed() -> str | None:
    """The version of the installed TensorRT, by its package's metadata; None where there is none."""
    from importlib import metadata

    for name in ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def default_toolchain() -> str:
    """The line of the installed TensorRT, else DEFAULT."""
    version = installed()
    return DEFAULT if version is None else dialect(version).toolchain
