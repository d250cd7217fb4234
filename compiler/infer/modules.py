"""A checkpoint's tensors as modules: a layer once, with `{i}` for its number."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from specs.checkpoint import Checkpoint

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Module:
    """`model.layers.{i}.mlp.up_proj`, the shapes of its weight and bias, and its name inside the layer."""

    name: str
    inner: str
    layered: bool
    weight: Shape | None
    bias: Shape | None

    @property
    def rank(self) -> int:
        """Dims of the weight; 0 where there is none."""
        return len(self.weight or ())


@dataclass(frozen=True)
class Modules:
    """All modules by name, the number of layers, and the tensors that are no module's weight or bias."""

    modules: dict[str, Module]
    layers: int
    loose: tuple[str, ...]


def modules_of(checkpoint: Checkpoint) -> Modules:
    """Group the tensors; those that not every layer has, or has in another shape, are loose."""
    numbered = {name: split for name in checkpoint.tensors if (split := _split(name)) is not None}
    stem = Counter(before for before, _, _ in numbered.values()).most_common(1)[0][0] if numbered else None
    indices = {number for before, number, _ in numbered.values() if before == stem}
    templates: dict[str, list[str]] = defaultdict(list)
    inner: dict[str, str] = {}
    for name in checkpoint.tensors:
        before, _, rest = numbered.get(name, (None, 0, ""))
        template = name
        if before is not None and before == stem:
            template = f"{before}{{i}}.{rest}"
            inner[template.rpartition(".")[0]] = rest.rpartition(".")[0]
        templates[template].append(name)
    weights: dict[str, dict[str, Shape]] = defaultdict(dict)
    loose: list[str] = []
    for template, names in templates.items():
        module, _, suffix = template.rpartition(".")
        shapes = {checkpoint.tensors[name].shape for name in names}
        complete = len(names) == (len(indices) if "{i}" in template else 1)
        if module and suffix in ("weight", "bias") and len(shapes) == 1 and complete:
            weights[module][suffix] = shapes.pop()
        else:
            loose.append(template)
    found = {
        name: Module(name, inner.get(name, name), name in inner, shapes.get("weight"), shapes.get("bias"))
        for name, shapes in weights.items()
    }
    bare = {name for name, module in found.items() if module.weight is None}
    loose += [f"{name}.bias" for name in sorted(bare)]
    return Modules({name: m for name, m in found.items() if name not in bare}, len(indices), tuple(loose))


def _split(name: str) -> tuple[str, int, str] | None:
    """`model.layers.`, 3 and `mlp.up_proj.weight`, at the first part that is a number."""
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return "".join(f"{one}." for one in parts[:index]), int(part), ".".join(parts[index + 1 :])
    return None
