"""Every spec in a size that a test can run: dims of a published size scaled down, with the graph that a GPU gets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compiler.frontend import Built, Limits, build
from compiler.ir import Graph
from compiler.passes.pipelines import pipeline
from compiler.passes.runner import Pass, run_passes
from specs.config import resolve_size
from specs.schema import load_spec
from specs.weight_map import WeightDecl
from tests.golden_errors import ROOT

SPECS = sorted((ROOT / "specs" / "models").glob("*.yaml"))
# What names of sizes become; a value that is no larger stays. Other whole numbers above 16 shrink as a head does.
SMALL = {
    "layers": 3, "d_head": 16, "d_ffn": 96, "vocab": 160, "context": 256, "window": 6, "experts": 4, "d_expert": 32,
    "rotated": 8,
}  # fmt: skip
HEADS = 4


@dataclass(frozen=True)
class Tiny:
    """A small model: its graph for a GPU, and its weights."""

    name: str
    role: str
    built: Built
    graph: Graph
    declared: tuple[WeightDecl, ...]

    def weights(self, name: str) -> torch.Tensor:
        """A weight by name, large enough that every one matters: matrices 0.15, gains around 1, biases 0.3."""
        decl = next(item for item in self.declared if item.name == name)
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        noise = torch.randn(decl.shape, generator=generator)
        if len(decl.shape) > 1:
            return noise * 0.15
        return noise * 0.3 + (1.0 if name.endswith(".weight") else 0.0)


def tiny(
    path: Path, precision: str = "fp32", *split: Pass, native: bool = False, wide: bool = False,
    codes: str | None = None,
) -> Tiny:  # fmt: skip
    """The first size of a spec scaled down, after the passes for a GPU.

    `split` makes the graph of a rank; `native`: for TensorRT's attention and cache; `wide`: rows are whole blocks of
    64; `codes`: of an 8-bit cache.
    """
    spec = load_spec(path)
    name, size = next(iter(spec.sizes.items()))
    config = resolve_size(replace_size(spec, name, scaled(dict(size.values), wide=wide)), name)
    limits = Limits(4, 64)
    built = build(spec, config, limits)
    from compiler.api import role_of
    from compiler.source import Source

    role = role_of(Source(spec, config, None, spec.name, None))
    graph, _ = run_passes(built.graph, pipeline(role, precision, "sm90", codes=codes, split=split, native=native))
    return Tiny(spec.name, role, built, graph, tuple(built.weights))


def replace_size(spec: Any, name: str, values: dict[str, Any]) -> Any:
    """A spec whose size of that name has other values."""
    size = spec.sizes[name].model_copy(update={"values": values})
    return spec.model_copy(update={"sizes": {**spec.sizes, name: size}})


def scaled(values: dict[str, Any], *, wide: bool = False) -> dict[str, Any]:
    """The values of a size, small: four heads, in the groups that it has one, some or as many of."""
    heads, groups = values["heads"], values.get("kv_heads")
    head = values.get("d_head", values["d_model"] // heads)
    small = {key: min(value, SMALL[key]) if key in SMALL else _shrunk(value, head) for key, value in values.items()}
    small["heads"] = HEADS
    if groups is not None:
        small["kv_heads"] = 1 if groups == 1 else HEADS if groups == heads else 2
    small["d_model"] = HEADS * 16 if values.get("d_head") is None or wide else 48
    if wide:
        small |= {key: -(-small[key] // 64) * 64 for key in ("d_ffn", "d_expert") if key in small}
    return small


def _shrunk(value: Any, head: int) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 16
    return max(2, value * 16 // head // 2 * 2) if whole else value
