"""Checkpoint folders, read from the headers alone: config.json and the names, shapes and places of every
tensor. No weight is touched.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specs.errors import SpecRTError, Where
from specs.packed import Packed, unpacked

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BLOCKS, SCALES = "_blocks", "_scales"  # the two tensors of an MXFP4 weight
MAX_HEADER = 100_000_000
_LFS = b"version https://git-lfs.github.com/spec/"

_NAMES_BY_BITS = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0",
    16: "I16 U16 F16 BF16",
    32: "I32 U32 F32",
    64: "I64 U64 F64 C64",
}
DTYPE_BITS = {name: bits for bits, names in _NAMES_BY_BITS.items() for name in names.split()}
"""Bits of an element by the dtype names of safetensors headers."""


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor; `begin` and `end` are byte offsets in `file`.

    `stored` is its name in the file where that is spelled differently; `in_place` tells that the file is no safetensors
    file, so the bytes are taken where they lie; `packed` that its numbers are made from tensors of a low-bit layout;
    `joined` that it is these pieces one after the other along `axis`, without what pads their first axis.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int
    stored: str | None = None
    in_place: bool = False
    packed: Packed | None = None
    joined: tuple[TensorInfo, ...] = ()
    axis: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder or archive: its configuration and its tensors' headers."""

    dir: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    config_name: str = "config.json"

    @property
    def config_where(self) -> Where:
        """The file of the configuration, for messages."""
        return Where(str(self.dir / self.config_name))

    @property
    def low_bit(self) -> bool:
        """Whether weights are stored in a low-bit layout."""
        return any(info.packed is not None or name.endswith(BLOCKS) for name, info in self.tensors.items())

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read config.json and all safetensors headers, single or sharded, or what specs/archive.py reads; raises
        CKPT-001 to CKPT-008, CKPT-015 to CKPT-017, CKPT-030, CKPT-031, CKPT-034.
        """
        from specs import archive
        from specs.formats import format_of
        from specs.ranks import read_ranks

        folder = Path(folder)
        if archive.is_archive(folder):
            return cls(folder, *archive.read_archive(folder), archive.CONFIG)
        if (folder / archive.CONFIG).is_file() and not (folder / "config.json").is_file():
            return cls(folder, *archive.read_folder(folder), archive.CONFIG)
        if not folder.is_dir():
            what = "checkpoint is a file, not a folder" if folder.exists() else "checkpoint folder does not exist"
            raise SpecRTError(
                "CKPT-001",
                f"the {what}",
                where=Where(str(folder)),
                hint="give the folder that holds config.json and model.safetensors",
            )
        config = read_json(_existing(folder, "config.json"))
        further = folder / "hf_quant_config.json"
        stated = read_json(further) if further.is_file() else {}
        form = format_of(config)
        tensors = read_tensors(folder) if form is None else read_ranks(folder, config, form.ranks)
        return cls(folder, *unpacked(config, stated, tensors, Where(str(folder / "config.json"))))


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    if path.is_file():
        return path
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        raise SpecRTError(
            "CKPT-002",
            "the checkpoint folder is empty",
            where=Where(str(folder)),
            hint="was the download interrupted? it needs config.json and model.safetensors",
        )
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise SpecRTError(
        "CKPT-002",
        f"the checkpoint folder has no {name}",
        where=Where(str(folder)),
        notes=(f"it holds {shown}",),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file whose top is an object; raises CKPT-003, CKPT-004."""
    data = path.read_bytes()
    _reject_lfs(path, data)
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=lambda pairs: _no_duplicates(pairs, path))
    except json.JSONDecodeError as error:
        raise SpecRTError(
            "CKPT-003", f"not valid JSON: {error.msg}", where=Where(str(path), error.lineno, error.colno)
        ) from error
    except UnicodeDecodeError as error:
        raise SpecRTError("CKPT-003", "not valid JSON: not UTF-8 text", where=Where(str(path))) from error
    if not isinstance(value, dict):
        raise SpecRTError("CKPT-003", "expected a JSON object", where=Where(str(path)))
    return value


def _no_duplicates(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise SpecRTError("CKPT-003", f"key `{twice}` is given twice", where=Where(str(path)))
    return result


def _reject_lfs(path: Path, start: bytes) -> None:
    if start.startswith(_LFS):
        raise SpecRTError(
            "CKPT-004",
            "this is a git-lfs pointer, not the file itself",
            where=Where(str(path)),
            hint="in the checkpoint's repository, run `git lfs install` and `git lfs pull`",
        )


# ---- tensors -----------------------------------------------------------------------------------------------


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of a folder by name, from `model.safetensors` or the shards of its index; raises CKPT-002,
    CKPT-004 to CKPT-008.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        raise SpecRTError(
            "CKPT-008",
            f"the folder holds both {SINGLE} and {INDEX}",
            where=Where(str(folder)),
            hint="they may differ; remove the one that is not the model",
        )
    if single.is_file():
        return read_header(single)
    if index.is_file():
        return _read_shards(folder, index)
    pickles = [entry.name for entry in folder.iterdir() if entry.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        raise SpecRTError(
            "CKPT-002",
            f"the checkpoint folder has no {SINGLE}, only {sorted(pickles)[0]}",
            where=Where(str(folder)),
            hint="pickled weights can run code and are not read; convert them to safetensors",
        )
    _existing(folder, SINGLE)
    return {}


def _read_shards(folder: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SpecRTError(
            "CKPT-007", "the index has no `weight_map` of tensor names to file names", where=Where(str(index))
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        path = folder / shard
        if Path(shard).name != shard:
            raise SpecRTError(
                "CKPT-007", f"the index names a file outside the folder: {shard}", where=Where(str(index))
            )
        expected = {name for name, file in weight_map.items() if file == shard}
        if not path.is_file():
            raise SpecRTError(
                "CKPT-007",
                f"the index names {shard}, which is not in the folder",
                where=Where(str(index)),
                notes=(f"{len(expected)} tensors should be in it",),
                hint="the folder is not complete; download it again",
            )
        found = read_header(path)
        for name in sorted(expected ^ set(found)):
            message = f"{shard} does not hold the tensor `{name}`, which the index lists there"
            if name in found:
                message = f"{shard} holds the tensor `{name}`, which the index does not list there"
            raise SpecRTError("CKPT-007", message, where=Where(str(index)))
        tensors.update(found)
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The header of one safetensors file, checked against the file's size; raises CKPT-004, CKPT-005,
    CKPT-006.
    """
    where = Where(str(path))
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LFS))
        _reject_lfs(path, start)
        file.seek(0)
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _truncated(where, size, "a header")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER:
            raise SpecRTError(
                "CKPT-006", f"not a safetensors file: it announces a header of {length} bytes", where=where
            )
        if 8 + length > size:
            raise _truncated(where, size, f"a header of {8 + length} bytes")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SpecRTError("CKPT-006", "not a safetensors file: its header is not JSON", where=where) from error
    if not isinstance(header, dict):
        raise SpecRTError("CKPT-006", "not a safetensors file: its header is not an object", where=where)
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_extent(where, size, 8 + length, tensors)
    return tensors


def _truncated(where: Where, size: int, expected: str) -> SpecRTError:
    return SpecRTError(
        "CKPT-005",
        f"the file is cut off: it has {size} bytes, expected {expected}",
        where=where,
        hint="download it again; the transfer did not finish",
    )


def _tensor(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        bits = DTYPE_BITS[dtype]
        for dim in shape:
            bits *= dim
        sound = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and 8 * (end - begin) == bits
    except (KeyError, TypeError, ValueError) as error:
        raise SpecRTError(
            "CKPT-006", f"the header's entry of `{name}` cannot be read: {entry}", where=Where(str(path))
        ) from error
    if not sound:
        raise SpecRTError(
            "CKPT-006",
            f"the header's entry of `{name}` is inconsistent: {dtype} {list(shape)} in bytes {begin} to {end}",
            where=Where(str(path)),
        )
    return TensorInfo(name, dtype, shape, path, base + begin, base + end)


def _check_extent(where: Where, size: int, base: int, tensors: dict[str, TensorInfo]) -> None:
    """The tensors lie one after the other and fill the file."""
    at = base
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end)):
        if info.begin != at:
            raise SpecRTError("CKPT-006", f"the tensor `{info.name}` overlaps another or leaves a gap", where=where)
        at = info.end
    if at > size:
        raise _truncated(where, size, f"{at} bytes")
    if at < size:
        raise SpecRTError("CKPT-006", f"the file has {size - at} bytes that belong to no tensor", where=where)
