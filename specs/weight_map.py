"""The weight map: which stored tensor each weight of the model is, proved from headers alone.

Every tensor of a checkpoint is used exactly once, or named as ignored, or is the second copy of a tied
weight; anything else is an error
with near names, before a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specs.checkpoint import Checkpoint, TensorInfo
from specs.errors import SpecRTError, Where
from specs.layouts import parse_layout
from specs.names import nearest
from specs.parts import Linear
from specs.schema import Spec, WeightFrom

if TYPE_CHECKING:
    import torch

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
MAX_LISTED = 8


@dataclass(frozen=True)
class WeightDecl:
    """A weight that the model needs: `layers.3.attn.q.weight` is leaf `attn.q`, suffix `weight`, layer 3."""

    name: str
    leaf: str
    suffix: str
    layer: int | None
    shape: tuple[int, ...]
    where: Where | None


@dataclass(frozen=True)
class Select:
    """What to take of a stored tensor: transpose it, view its rows as [outer, axis, inner], keep `start:stop`
    of the axis.
    """

    transpose: bool = False
    outer: int = 1
    axis: int = 1
    inner: int = 1
    start: int = 0
    stop: int = 1

    @property
    def whole(self) -> bool:
        """Whether all rows are taken."""
        return self.stop - self.start == self.axis


@dataclass(frozen=True)
class WeightSource:
    """Where one weight comes from."""

    tensor: TensorInfo
    select: Select
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The weight in the file's dtype and our shape, contiguous; only its file's pages are touched."""
        from safetensors import safe_open

        with safe_open(self.tensor.file, framework="pt") as file:
            return take(file.get_tensor(self.tensor.name), self.select, self.shape)


def take(stored: torch.Tensor, select: Select, shape: tuple[int, ...]) -> torch.Tensor:
    """Apply a selection to a stored tensor [rows, ...] (or [in, out] when transposed)."""
    if select.transpose and stored.ndim > 1:
        stored = stored.mT
    if not select.whole:
        rest = stored.shape[1:]
        stored = stored.reshape(select.outer, select.axis, select.inner, *rest)[:, select.start : select.stop]
    return stored.reshape(shape).contiguous()


@dataclass(frozen=True)
class _Entry:
    """How to find one leaf: its `checkpoint:` entry, and its place in the bracket of a fused layout."""

    key: str
    source: WeightFrom
    piece: str | None
    where: Where


def map_weights(
    spec: Spec, env: Mapping[str, Any], needed: Sequence[WeightDecl], checkpoint: Checkpoint
) -> dict[str, WeightSource]:
    """The source of every needed weight; `env` is the resolved config; raises SPEC-033, CKPT-010 to CKPT-014."""
    entries = _entries(spec)
    mapper = _Mapper(spec, env, checkpoint, entries)
    sources = {decl.name: mapper.source(decl) for decl in needed}
    mapper.raise_problems()
    mapper.check_all_used(needed)
    return sources


def _entries(spec: Spec) -> dict[str, _Entry]:
    found: dict[str, _Entry] = {}
    for key, source in spec.checkpoint.items():
        where = spec.key_where("checkpoint", key)
        if source.layout is None:
            found[key] = _Entry(key, source, None, where)
            continue
        prefix = key.rpartition(".")[0]
        for piece in parse_layout(source.layout, source.where).pieces:
            found[f"{prefix}.{piece.name}" if prefix else piece.name] = _Entry(key, source, piece.name, where)
    return found


def _templates(source: WeightFrom, suffix: str) -> tuple[str, ...]:
    """The full tensor name for a suffix; several when the module is written `a | b` (the first that exists)."""
    full = source.weight if suffix == "weight" else source.bias if suffix == "bias" else None
    if full is not None:
        return tuple(name.strip() for name in full.split("|"))
    if source.source is None:
        return ()
    return tuple(f"{name.strip()}.{suffix}" for name in source.source.split("|"))


class _Mapper:
    """Collects the sources and the problems of one checkpoint."""

    def __init__(self, spec: Spec, env: Mapping[str, Any], checkpoint: Checkpoint, entries: dict[str, _Entry]) -> None:
        self.spec, self.env, self.checkpoint, self.entries = spec, env, checkpoint, entries
        self.where = Where(str(checkpoint.dir))
        self.users: dict[str, str] = {}  # stored piece -> the weight that uses it
        self.missing: list[tuple[WeightDecl, str]] = []
        self.tied = _tied_parts(spec, env)

    def source(self, decl: WeightDecl) -> WeightSource:
        """Find, check and book the tensor of one weight; a missing one is noted and reported with the others."""
        entry = self.entries.get(decl.leaf)
        templates = _templates(entry.source, decl.suffix) if entry else ()
        if entry is None or not templates:
            raise SpecRTError(
                "SPEC-033",
                f"`checkpoint` does not say where the {decl.suffix} of `{decl.leaf}` is",
                where=self.spec.key_where("checkpoint"),
                notes=_needed(decl),
                hint=f"add `{decl.leaf}: their.module.name`",
            )
        names = [_expand(template, decl.layer) for template in templates]
        info = next((self.checkpoint.tensors[name] for name in names if name in self.checkpoint.tensors), None)
        if info is None:
            info = self._tied_copy(decl)
        if info is None:
            self.missing.append((decl, names[0]))
            return WeightSource(
                TensorInfo(names[0], "F32", decl.shape, self.checkpoint.dir, 0, 0), Select(), decl.shape
            )
        select = self._select(decl, entry, info)
        self._book(decl, entry, info)
        return WeightSource(info, select, decl.shape)

    def _tied_copy(self, decl: WeightDecl) -> TensorInfo | None:
        """Files that store a tied weight once may store it under the other name."""
        for part, target in self.tied.items():
            entry = self.entries.get(part)
            if target == decl.leaf and entry is not None and decl.suffix == "weight":
                for template in _templates(entry.source, "weight"):
                    if template in self.checkpoint.tensors:
                        return self.checkpoint.tensors[template]
        return None

    def _book(self, decl: WeightDecl, entry: _Entry, info: TensorInfo) -> None:
        user = self.users.setdefault(f"{info.name}#{entry.piece or ''}", decl.name)
        if user != decl.name:
            raise SpecRTError(
                "CKPT-013",
                f"the tensor `{info.name}` would be used twice: for `{user}` and for `{decl.name}`",
                where=entry.where,
            )
        self.users.setdefault(info.name, decl.name)

    def _select(self, decl: WeightDecl, entry: _Entry, info: TensorInfo) -> Select:
        if info.dtype not in FLOAT_DTYPES:
            raise SpecRTError(
                "CKPT-014",
                f"`{info.name}` is stored as {info.dtype}; a weight must be one of {', '.join(sorted(FLOAT_DTYPES))}",
                where=Where(str(info.file)),
                hint="this looks like a quantized checkpoint; use the one it was made from",
            )
        transpose = entry.source.transpose and len(info.shape) > 1
        shape = info.shape[::-1] if transpose else info.shape
        if entry.piece is None:
            expected, select = decl.shape, Select(transpose=transpose)
        else:
            layout = parse_layout(entry.source.layout or "", entry.source.where)
            outer, spans, axis, inner = layout.sizes({**self.env, "layer": decl.layer})
            start, stop = spans[entry.piece]
            select = Select(transpose, outer, axis, inner, start, stop)
            expected = (outer * axis * inner, *decl.shape[1:])
            rows = outer * (stop - start) * inner
            if rows != decl.shape[0]:
                raise SpecRTError(
                    "CKPT-012",
                    f"the layout `{layout.text}` gives `{decl.name}` {rows} rows, but it needs {decl.shape[0]}",
                    where=entry.where,
                    notes=_needed(decl),
                )
        if shape != expected:
            raise self._misshaped(decl, entry, info, expected, transpose)
        return select

    def _misshaped(
        self, decl: WeightDecl, entry: _Entry, info: TensorInfo, expected: tuple[int, ...], transpose: bool
    ) -> SpecRTError:
        stored = list(expected[::-1] if transpose else expected)
        hint = None
        if len(expected) == 2 and list(info.shape) == stored[::-1]:
            hint = f"it is stored the other way round: `transpose: {'false' if transpose else 'true'}` at {entry.where}"
        return SpecRTError(
            "CKPT-012",
            f"`{info.name}` has the shape {list(info.shape)}, expected {stored}",
            where=Where(str(info.file)),
            notes=(f"it is `{decl.name}`", *_needed(decl)),
            hint=hint,
        )

    def raise_problems(self) -> None:
        """Report missing tensors together; the nearest unused names come as hints."""
        if not self.missing:
            return
        unused = [name for name in self.checkpoint.tensors if name not in self.users]
        users: dict[str, WeightDecl] = {}
        for decl, name in self.missing:
            users.setdefault(name, decl)
        lines = []
        for template, names in _by_layer(users).items():
            close = nearest(names[0], unused, 1)
            lines.append(
                f"{_shown(template, names)} for `{users[names[0]].leaf}`"
                + (f"; nearest is `{close[0]}`" if close else "")
            )
        leaf = self.missing[0][0].leaf
        part = self.spec.parts[leaf.split(".")[0]]
        tied = part.tied if isinstance(part, Linear) else None
        raise SpecRTError(
            "CKPT-010",
            f"the checkpoint lacks {_tensors(len(users))} that `{self.spec.name}` needs",
            where=self.where,
            notes=[*_shortened(lines), f"mapped at {self.entries[leaf].where}"],
            hint=f"`{leaf}` has a weight of its own unless `{tied.when.text}` holds" if tied else None,
        )

    def check_all_used(self, needed: Sequence[WeightDecl]) -> None:
        """Whatever is left must be ignored by the spec or be the copy of a tied weight."""
        allowed = [_pattern(name) for name in (self.spec.ignore.tensors if self.spec.ignore else ())]
        for part in self.tied:
            entry = self.entries.get(part)
            if entry is not None:
                allowed += [_pattern(name) for name in _templates(entry.source, "weight")]
        extra = [
            name
            for name in self.checkpoint.tensors
            if name not in self.users and not any(pattern.fullmatch(name) for pattern in allowed)
        ]
        unfinished = self._partly_used(needed)
        if not extra and not unfinished:
            return
        mapped = [name for entry in self.entries.values() for name in _templates(entry.source, "weight")]
        lines = []
        for template, names in _by_layer(extra).items():
            close = nearest(template, mapped, 1)
            shape = list(self.checkpoint.tensors[names[0]].shape)
            near = f"; nearest in the spec is `{close[0]}`" if close else ""
            lines.append(f"{_shown(template, names)} {shape}{near}")
        raise SpecRTError(
            "CKPT-011",
            f"the checkpoint holds {_tensors(len(extra) + len(unfinished))} that `{self.spec.name}` does not use",
            where=self.where,
            notes=_shortened([*lines, *unfinished]),
            hint="every tensor must be used: map it in `checkpoint`, or list it under `ignore: {tensors: [...]}`",
        )

    def _partly_used(self, needed: Iterable[WeightDecl]) -> list[str]:
        """Fused tensors of which a piece is used by no weight."""
        problems = []
        for decl in needed:
            entry = self.entries[decl.leaf]
            if entry.source.layout is None:
                continue
            for template in _templates(entry.source, decl.suffix):
                name = _expand(template, decl.layer)
                if name not in self.users:
                    continue
                for piece in parse_layout(entry.source.layout, entry.source.where).pieces:
                    line = f"`{name}`: its piece `{piece.name}`"
                    if f"{name}#{piece.name}" not in self.users and line not in problems:
                        problems.append(line)
        return problems


def _tied_parts(spec: Spec, env: Mapping[str, Any]) -> dict[str, str]:
    """{part that has no weight of its own: the part whose weight it uses}."""
    found = {}
    for name, part in spec.parts.items():
        tied = part.tied if isinstance(part, Linear) else None
        if tied is not None and tied.when.as_bool(env):
            found[name] = tied.to
    return found


def _needed(decl: WeightDecl) -> list[str]:
    return [f"needed at {decl.where}"] if decl.where else []


def _expand(template: str, layer: int | None) -> str:
    return template.replace("{i}", str(layer)) if layer is not None else template


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{i\}", r"\d+"))


def _tensors(count: int) -> str:
    return f"{count} tensor" + ("" if count == 1 else "s")


def _shortened(lines: list[str]) -> list[str]:
    return [*lines[:MAX_LISTED], *([f"and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else [])]


def _by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Tensor names that differ in one number only, together: `{i}` for the number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name), []).append(name)
    return groups


def _shown(template: str, names: list[str]) -> str:
    """`model.layers.{i}.norm.weight` (i = 0, 1, ...), or the name itself where there is one."""
    if len(names) == 1:
        return f"`{names[0]}`"
    numbers = sorted({int(number) for name in names for number in re.findall(r"(?<=\.)\d+(?=\.)", name)[:1]})
    return f"`{template}` (i = {', '.join(map(str, numbers[:4]))}{', ...' if len(numbers) > 4 else ''})"
