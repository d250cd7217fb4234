"""Reads a bundle: checks that it is whole, unchanged and made for this runtime, before anything is loaded from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from runtime.beam_search import Beams
from runtime.derive import Rules, read_rules
from runtime.program import Program, read_program, stage_of
from specs.errors import SpecRTError, Where

FORMAT = 1
MANIFEST = "bundle.json"
ROLES = ("decoder", "encoder")


@dataclass(frozen=True)
class Limits:
    """What a bundle was compiled for: sequences at once, and tokens in each."""

    max_batch: int
    max_sequence: int


@dataclass(frozen=True)
class Chat:
    """How a conversation becomes a prompt: a Jinja template, and the special tokens that it may name."""

    template: Path
    tokens: Mapping[str, str]


@dataclass(frozen=True)
class Bundle:
    """A directory that passed every check; `manifest` and `plan` are the JSON as it stands in the files."""

    path: Path
    manifest: Mapping[str, Any]
    plan: Mapping[str, Any]
    program: Program
    limits: Limits
    name: str
    role: str
    vocab: int
    stop: tuple[int, ...]
    toolchain: Mapping[str, str]
    tokenizer: Path | None
    chat: Chat | None = None
    derive: Rules = field(default_factory=dict)
    bounds: Mapping[str, int] = field(default_factory=dict)
    beams: Beams = field(default_factory=Beams)
    tensor: int = 1  # GPUs that share each product
    pipeline: int = 1  # stages, each on GPUs of its own

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Bundle:
        """Read and check a bundle; without `verify` the files' hashes are not computed, their sizes are compared still.

        Raises SpecRTError BUNDLE-001 to BUNDLE-008.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        files = _files(folder, manifest)
        for name, entry in files.items():
            _check_file(folder, name, entry, verify)
        if "plan.json" not in files:
            raise _broken(folder, "`files` does not list plan.json")
        plan, program = read_program(folder / "plan.json")
        for step in program.steps:
            if step.file and step.file not in files:
                raise SpecRTError("BUNDLE-008", f"`files` of the bundle does not list `{step.file}`, which a step runs",
                                  where=Where(str(folder / "plan.json")), hint=_REMAKE)  # fmt: skip
        try:
            ranks = _count(manifest.get("parallel", {}).get("tensor", 1))
            if missing := [name for name in map(plan_file, range(ranks)) if name not in files]:
                raise _broken(folder, f"`files` does not list {missing[0]}, and {ranks} GPUs share each product")
            return cls(
                path=folder,
                manifest=manifest,
                plan=plan,
                program=program,
                limits=Limits(_count(manifest["limits"]["max_batch"]), _count(manifest["limits"]["max_sequence"])),
                name=str(manifest["name"]),
                role=_role(manifest["role"]),
                vocab=_count(manifest["vocab"]),
                stop=tuple(int(token) for token in manifest["generation"]["stop"]),
                toolchain={str(key): str(value) for key, value in manifest["toolchain"].items()},
                tokenizer=_tokenizer(folder, manifest["tokenizer"], files),
                chat=_chat(folder, manifest.get("chat"), files),
                derive=read_rules(manifest.get("derive", {})),
                beams=_beams(manifest["generation"]),
                tensor=ranks,
                pipeline=_count(manifest.get("parallel", {}).get("pipeline", 1)),
                bounds={str(name): _count(rows) for name, rows in manifest.get("bounds", {}).items()},
            )
        except KeyError as error:
            raise _broken(folder, f"key {error} is missing") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise _broken(folder, str(error)) from error

    def of_rank(self, rank: int) -> Bundle:
        """What one of those runs that share each product, all its stages. Raises SpecRTError BUNDLE-008."""
        return self if rank == 0 else replace(self, program=read_program(self.path / plan_file(rank))[1])

    def of_stage(self, stage: int) -> Bundle:
        """What one stage of a pipeline runs."""
        return replace(self, program=stage_of(self.program, stage))


def plan_file(rank: int) -> str:
    """The plan of one of those that share each product."""
    return f"plan-{rank}.json" if rank else "plan.json"


_REMAKE = "compile the bundle again: `specrt compile SOURCE --out BUNDLE`"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        what = f"has no {MANIFEST}" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
        hint = "a bundle is the folder that `specrt compile SOURCE --out BUNDLE` writes"
        raise SpecRTError("BUNDLE-001", f"`{folder}` is no bundle: it {what}", hint=hint) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(folder, "it can't be read: " + (getattr(error, "strerror", None) or "not UTF-8")) from error
    try:
        manifest = json.loads(text)
    except json.JSONDecodeError as error:
        raise SpecRTError("BUNDLE-002", f"{MANIFEST} is not JSON: {error.msg}",
                          where=Where(str(path), error.lineno, error.colno), hint=_REMAKE) from error  # fmt: skip
    if not isinstance(manifest, dict):
        raise _broken(folder, "expected an object")
    if manifest.get("format") != FORMAT:
        maker = manifest.get("specrt", "an unknown version")
        theirs = f"the bundle has format {manifest.get('format')}, written by specrt {maker}"
        message = f"{theirs}; this runtime reads format {FORMAT}"
        raise SpecRTError("BUNDLE-003", message, where=Where(str(path)), hint=_REMAKE)
    return manifest


def _broken(folder: Path, reason: str) -> SpecRTError:
    return SpecRTError(
        "BUNDLE-002", f"{MANIFEST} is damaged: {reason}", where=Where(str(folder / MANIFEST)), hint=_REMAKE
    )


def _files(folder: Path, manifest: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    entries = manifest.get("files")
    if not isinstance(entries, dict):
        raise _broken(folder, "`files` is not an object")
    files: dict[str, tuple[int, str]] = {}
    for name, entry in entries.items():
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise _broken(folder, f"file `{name}` is outside the bundle")
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("size"), int)
            or not isinstance(entry.get("sha256"), str)
        ):
            raise _broken(folder, f"file `{name}` has no size and sha256")
        files[name] = (entry["size"], entry["sha256"])
    return files


def _check_file(folder: Path, name: str, entry: tuple[int, str], verify: bool) -> None:
    path, (size, sha256) = folder / name, entry
    try:
        found = path.stat().st_size
        if not path.is_file():
            raise FileNotFoundError
        if found != size:
            why = "the file is truncated" if found < size else "the file was changed"
            message = f"`{name}` has {found} bytes, expected {size}: {why}"
            raise SpecRTError("BUNDLE-006", message, where=Where(str(path)), hint=_COPY)
        if verify and _sha256(path) != sha256:
            message = f"`{name}` is corrupted: its SHA-256 is not the one in {MANIFEST}"
            raise SpecRTError("BUNDLE-007", message, where=Where(str(path)), hint=_COPY)
    except OSError as error:
        reason = (
            "is missing"
            if isinstance(error, (FileNotFoundError, NotADirectoryError))
            else f"can't be read: {error.strerror}"
        )
        raise SpecRTError("BUNDLE-005", f"`{name}` {reason}", where=Where(str(path)), hint=_COPY) from error


_COPY = "copy the bundle again, or compile it again: `specrt compile SOURCE --out BUNDLE`"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"expected a count, found {value!r}")
    return value


def _beams(generation: Mapping[str, Any]) -> Beams:
    """How the bundle's checkpoint searches, where it says so."""
    try:
        return Beams(**{name: value for name, value in generation.items() if name != "stop"})
    except SpecRTError as error:
        raise ValueError(error.message) from error


def _tokenizer(folder: Path, name: object, files: Mapping[str, object]) -> Path | None:
    return None if name is None else _listed(folder, "tokenizer", name, files)


def _listed(folder: Path, what: str, name: object, files: Mapping[str, object]) -> Path:
    if name not in files:
        raise ValueError(f"{what} `{name}` is not in `files`")
    return folder / str(name)


def _chat(folder: Path, entry: Mapping[str, Any] | None, files: Mapping[str, object]) -> Chat | None:
    if entry is None:  # the checkpoint has no template, or an earlier version compiled the bundle
        return None
    template = _listed(folder, "chat template", entry["template"], files)
    return Chat(template, {str(name): str(token) for name, token in entry["tokens"].items()})


def _role(value: object) -> str:
    if value not in ROLES:
        raise ValueError(f"role is {value!r}, expected {' or '.join(ROLES)}")
    return str(value)
