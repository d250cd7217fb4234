"""The weight map: which stored tensor each weight of the model is, proved from headers alone.

Every tensor of a checkpoint is used exactly once, or named as ignored, or is the second copy of a tied
weight; anything else is an error
with near names, before a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from specs.checkpoint import BLOCKS, SCALES, Checkpoint, TensorInfo
from specs.errors import SpecRTError, Where
from specs.layouts import parse_layout
from specs.names import nearest
from specs.parts import Linear
from specs.schema import Spec, WeightFrom
from specs.weight_source import Select, WeightSource, take

__all__ = ["Select", "WeightDecl", "WeightSource", "map_weights", "take"]

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


def _entries(spec: Spec) -> dict[str, list[_Entry]]:
    """The entries of each leaf: those that name it alone first, then fused ones."""
    found: dict[str, list[_Entry]] = {}
    for key, source in spec.checkpoint.items():
        where = spec.key_where("checkpoint", key)
        if source.layout is None:
            found.setdefault(key, []).insert(0, _Entry(key, source, None, where))
            continue
        prefix = key.rpartition(".")[0]
        for piece in parse_layout(source.layout, source.where).pieces:
            leaf = f"{prefix}.{piece.name}" if prefix else piece.name
            found.setdefault(leaf, []).append(_Entry(key, source, piece.name, where))
    return found


def _templates(source: WeightFrom, suffix: str) -> tuple[str, ...]:
    """The full tensor name for a suffix; several when the module is written `a | b` (the first that exists)."""
    full = source.weight if suffix == "weight" else source.bias if suffix == "bias" else None
    names: tuple[str, ...] = ()
    if full is not None:
        names = tuple(name.strip() for name in full.split("|"))
    elif source.source is not None:
        names = tuple(f"{name.strip()}.{suffix}" for name in source.source.split("|"))
    packed = source.mxfp4 is not None and suffix == "weight"
    return (*names, f"{source.mxfp4}{BLOCKS}") if packed else names


class _Mapper:
    """Collects the sources and the problems of one checkpoint."""

    def __init__(
        self, spec: Spec, env: Mapping[str, Any], checkpoint: Checkpoint, entries: dict[str, list[_Entry]]
    ) -> None:
        self.spec, self.env, self.checkpoint, self.entries = spec, env, checkpoint, entries
        self.where = Where(str(checkpoint.dir))
        self.users: dict[str, str] = {}  # stored piece -> the weight that uses it
        self.missing: list[tuple[WeightDecl, str]] = []
        self.tied = _tied_parts(spec, env)

    def source(self, decl: WeightDecl) -> WeightSource:
        """Find, check and book the tensors of one weight; a missing one is noted and reported with the others."""
        found = [
            (entry, name) for entry in self.entries.get(decl.leaf, ()) for name in _templates(entry.source, decl.suffix)
        ]
        if not found:
            raise SpecRTError(
                "SPEC-033",
                f"`checkpoint` does not say where the {decl.suffix} of `{decl.leaf}` is",
                where=self.spec.key_where("checkpoint"),
                notes=_needed(decl),
                hint=f"add `{decl.leaf}: their.module.name`",
            )
        for entry, template in found:
            names = _expand(template, decl)
            if names[0] in self.checkpoint.tensors:
                if "{e}" in template:
                    return self._stack(decl, entry, names)
                return replace(self._one(decl, entry, names[0]), copies=self._tied_copies(decl))
        entry, template = found[0]
        names = _expand(template, decl)
        copies = self._tied_copies(decl)  # files that store a tied weight once may store it under the other name
        return self._one(decl, entry, copies[0].name) if copies else self._absent(decl, names)

    def _absent(self, decl: WeightDecl, names: list[str]) -> WeightSource:
        self.missing += [(decl, name) for name in names]
        nothing = TensorInfo(names[0], "F32", decl.shape, self.checkpoint.dir, 0, 0)
        return WeightSource(nothing, Select(), decl.shape)

    def _one(self, decl: WeightDecl, entry: _Entry, name: str) -> WeightSource:
        info, scales = self.checkpoint.tensors[name], None
        if entry.source.mxfp4 is not None and name.endswith(BLOCKS):
            scales_name = name.removesuffix(BLOCKS) + SCALES
            if scales_name not in self.checkpoint.tensors:
                return self._absent(decl, [scales_name])
            scales = self.checkpoint.tensors[scales_name]
            self._book(decl, entry, scales)
        select = self._select(decl, entry, info, scales)
        self._book(decl, entry, info)
        return WeightSource(info, select, decl.shape, scales=scales)

    def _stack(self, decl: WeightDecl, entry: _Entry, names: list[str]) -> WeightSource:
        """One tensor for each index of the weight's first axis."""
        lacking = [name for name in names if name not in self.checkpoint.tensors]
        if lacking:
            return self._absent(decl, lacking)
        infos = tuple(self.checkpoint.tensors[name] for name in names)
        each = replace(decl, shape=decl.shape[1:])
        for info in infos:
            select = self._select(each, entry, info, None)
            self._book(decl, entry, info)
        return WeightSource(infos[0], select, decl.shape, infos)

    def _tied_copies(self, decl: WeightDecl) -> tuple[TensorInfo, ...]:
        """Tensors of the parts that use this weight."""
        users = [part for part, target in self.tied.items() if target == decl.leaf and decl.suffix == "weight"]
        names = [name for part in users for name in self._weights_of(part)]
        return tuple(self.checkpoint.tensors[name] for name in names if name in self.checkpoint.tensors)

    def _weights_of(self, leaf: str) -> list[str]:
        return [name for entry in self.entries.get(leaf, ()) for name in _templates(entry.source, "weight")]

    def _book(self, decl: WeightDecl, entry: _Entry, info: TensorInfo) -> None:
        user = self.users.setdefault(f"{info.name}#{entry.piece or ''}", decl.name)
        if user != decl.name:
            raise SpecRTError(
                "CKPT-013",
                f"the tensor `{info.name}` would be used twice: for `{user}` and for `{decl.name}`",
                where=entry.where,
            )
        self.users.setdefault(info.name, decl.name)

    def _select(self, decl: WeightDecl, entry: _Entry, info: TensorInfo, scales: TensorInfo | None) -> Select:
        if info.dtype not in FLOAT_DTYPES and scales is None:
            raise SpecRTError(
                "CKPT-014",
                f"`{info.name}` is stored as {info.dtype}; a weight must be one of {', '.join(sorted(FLOAT_DTYPES))}",
                where=Where(str(info.file)),
                hint="this looks like a quantized checkpoint; use the one it was made from",
            )
        plain = scales is None and info.packed is None  # a low-bit layout is [out, in] whatever it was made from
        transpose = entry.source.transpose and plain and decl.suffix == "weight" and len(info.shape) > 1
        shape = _swapped(info.shape) if transpose else info.shape
        if scales is not None:
            shape = self._unpacked(decl, info, scales)
        if entry.piece is None:
            expected, select = decl.shape, Select(transpose=transpose)
        else:
            layout = parse_layout(entry.source.layout or "", entry.source.where)
            outer, spans, axis, inner = layout.sizes({**self.env, "layer": decl.layer})
            start, stop = spans[entry.piece]
            columns = decl.shape[-1:] if decl.suffix == "weight" and len(decl.shape) > 1 else ()
            leading = decl.shape[: len(decl.shape) - len(columns)]
            rows, copies = outer * (stop - start) * inner, 1
            if entry.source.copies is not None and rows != prod(leading):
                copies = entry.source.copies.as_int(self.env)
            where = Where(str(info.file)) if copies > 1 else None
            rows, select = rows // copies, Select(transpose, outer, axis, inner, start, stop, copies, where)
            expected = (*leading[:-1], outer * axis * inner // prod(leading[:-1]), *columns)
            if rows != prod(leading):
                raise SpecRTError(
                    "CKPT-012",
                    f"the layout `{layout.text}` gives `{decl.name}` {rows} rows, but it needs {prod(leading)}",
                    where=entry.where,
                    notes=_needed(decl),
                )
        if shape != expected:
            raise self._misshaped(decl, entry, info, expected, transpose)
        return select

    def _unpacked(self, decl: WeightDecl, info: TensorInfo, scales: TensorInfo) -> tuple[int, ...]:
        """The shape of an MXFP4 weight: blocks [..., G, 16] and scales [..., G] of bytes are [..., 32 G]."""
        fits = info.shape == (*scales.shape, 16) and info.dtype == scales.dtype == "U8"
        if not fits:
            raise SpecRTError(
                "CKPT-012",
                f"`{info.name}` is {info.dtype} {list(info.shape)} with scales {scales.dtype} {list(scales.shape)}; "
                "MXFP4 has U8 [..., G, 16] with U8 [..., G]",
                where=Where(str(info.file)),
                notes=(f"it is `{decl.name}`", *_needed(decl)),
            )
        return (*info.shape[:-2], 32 * info.shape[-2])

    def _misshaped(
        self, decl: WeightDecl, entry: _Entry, info: TensorInfo, expected: tuple[int, ...], transpose: bool
    ) -> SpecRTError:
        stored = list(_swapped(expected) if transpose else expected)
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
            notes=[*_shortened(lines), f"mapped at {self.entries[leaf][0].where}"],
            hint=f"`{leaf}` has a weight of its own unless `{tied.when.text}` holds" if tied else None,
        )

    def check_all_used(self, needed: Sequence[WeightDecl]) -> None:
        """Whatever is left must be ignored by the spec or be the copy of a tied weight."""
        allowed = [_pattern(name, self.env) for name in (self.spec.ignore.tensors if self.spec.ignore else ())]
        allowed += [_pattern(name, self.env) for part in self.tied for name in self._weights_of(part)]
        extra = [
            name
            for name in self.checkpoint.tensors
            if name not in self.users and not any(pattern.fullmatch(name) for pattern in allowed)
        ]
        unfinished = self._partly_used(needed)
        if not extra and not unfinished:
            return
        mapped = [name for leaf in self.entries for name in self._weights_of(leaf)]
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
            fused = [entry for entry in self.entries[decl.leaf] if entry.source.layout is not None]
            names = [
                (name, entry)
                for entry in fused
                for template in _templates(entry.source, decl.suffix)
                for name in _expand(template, decl)
                if name in self.users
            ]
            for name, entry in names:
                for piece in parse_layout(entry.source.layout or "", entry.source.where).pieces:
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


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _needed(decl: WeightDecl) -> list[str]:
    return [f"needed at {decl.where}"] if decl.where else []


def _expand(template: str, decl: WeightDecl) -> list[str]:
    """The tensor that a template names for a weight; with `{e}`, one for each index of the weight's first axis."""
    name = template.replace("{i}", str(decl.layer)) if decl.layer is not None else template
    return [name.replace("{e}", str(number)) for number in range(decl.shape[0])] if "{e}" in name else [name]


def _pattern(template: str, env: Mapping[str, Any]) -> re.Pattern[str]:
    """`{i}` stands for any number, `{name}` for that config name's value, `*` for anything."""
    pieces = re.split(r"(\{\w+\}|\*)", template)
    special = {"{i}": r"\d+", "*": ".*"}
    texts = [
        special[piece] if piece in special else str(env[piece[1:-1]]) if piece[:1] == "{" else re.escape(piece)
        for piece in pieces
    ]
    return re.compile("".join(texts))


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
