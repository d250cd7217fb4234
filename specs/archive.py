"""Checkpoints of a training toolkit: `model_config.yaml` and `model_weights.ckpt`, in a tar archive or a folder.

The weights are a zip that torch wrote: a pickle of names and shapes, and the numbers beside it, uncompressed. The
pickle is read with stand-ins in place of everything that it names, so nothing of it is executed. The numbers stay where
they lie, also inside of an archive, until they are needed.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from specs.checkpoint import DTYPE_BITS, TensorInfo
from specs.errors import SpecRTError, Where

CONFIG = "model_config.yaml"
WEIGHTS = "model_weights.ckpt"
_RANKS = ("mp_rank_", "tp_rank_")
_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip


def is_archive(path: Path) -> bool:
    """Whether a file is a tar archive."""
    return path.is_file() and tarfile.is_tarfile(path)


def read_archive(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The configuration and the tensors of an archive; raises CKPT-003, CKPT-015 to CKPT-017."""
    try:
        with tarfile.open(path, "r:") as archive:
            members = {Path(member.name).as_posix(): member for member in archive if member.isfile()}
            config, weights = _member(path, members, CONFIG), _member(path, members, WEIGHTS)
            stream = archive.extractfile(config)
            assert stream is not None  # a file
            content = _config(Where(f"{path}/{CONFIG}"), stream.read())
    except tarfile.ReadError as error:
        hint = "unpack it (`tar xf ARCHIVE -C FOLDER`) and name the folder"
        raise SpecRTError(
            "CKPT-015", "the archive is compressed or damaged, and is read in place", where=Where(str(path)), hint=hint
        ) from error
    return content, read_weights(path, weights.offset_data, weights.size)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The same of an unpacked archive."""
    names = {entry.relative_to(folder).as_posix(): entry for entry in folder.rglob("*") if entry.is_file()}
    path = _member(folder, names, WEIGHTS)
    content = _config(Where(str(folder / CONFIG)), (folder / CONFIG).read_bytes())
    return content, read_weights(path, 0, path.stat().st_size)


def _member(path: Path, members: Mapping[str, Any], name: str) -> Any:
    if name in members:
        return members[name]
    where = Where(str(path))
    ranks = sorted({part for member in members for part in member.split("/") if part.startswith(_RANKS)})
    if name == WEIGHTS and ranks:
        raise SpecRTError(
            "CKPT-016",
            f"the weights are split over {len(ranks)} ranks: {', '.join(ranks[:4])}",
            where=where,
            hint="join them with the toolkit that trained the model (tensor and pipeline parallel size 1)",
        )
    shown = ", ".join(sorted(members)[:8])
    raise SpecRTError("CKPT-015", f"there is no {name} in it", where=where, notes=(f"it holds {shown}",))


def _config(where: Where, data: bytes) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(data)
    except yaml.YAMLError as error:
        raise SpecRTError("CKPT-003", f"not valid YAML: {str(error).splitlines()[0]}", where=where) from error
    if not isinstance(content, dict):
        raise SpecRTError("CKPT-003", "expected a mapping", where=where)
    # These files name no model type: their own name stands for it in `match`.
    return {"model_type": CONFIG, **content}


# ---- the zip of torch --------------------------------------------------------------------------------------


def read_weights(path: Path, offset: int, size: int) -> dict[str, TensorInfo]:
    """The tensors of a file that torch saved, `size` bytes from `offset` of `path`; raises CKPT-017."""
    where = Where(str(path))
    with path.open("rb") as file:
        part = cast("IO[bytes]", _Part(file, offset, size))
        try:
            with zipfile.ZipFile(part) as archive:
                entries = {entry.filename: entry for entry in archive.infolist()}
                name = next((name for name in entries if name.endswith("/data.pkl")), None)
                if name is None:
                    raise zipfile.BadZipFile("it has no data.pkl")
                root = name[: -len("data.pkl")]
                order = archive.read(f"{root}byteorder") if f"{root}byteorder" in entries else b"little"
                state = _Unpickler(io.BytesIO(archive.read(name)), where).load()
        except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
            raise _unreadable(where, f"it is not what torch writes: {error}") from error
        if order != b"little":
            raise _unreadable(where, "its numbers are big-endian")
        if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
            state = state["state_dict"]
        if not isinstance(state, Mapping):
            raise _unreadable(where, "it is not a mapping of names to tensors")
        spans = {
            key: (offset + _data_begin(part, entry), entry.file_size)
            for key, entry in entries.items()
            if key.startswith(f"{root}data/") and entry.compress_type == zipfile.ZIP_STORED
        }
    tensors = {key: value for key, value in state.items() if isinstance(value, _Tensor)}
    return {key: _info(path, str(key), value, spans, f"{root}data/") for key, value in tensors.items()}


def _unreadable(where: Where, reason: str) -> SpecRTError:
    return SpecRTError("CKPT-017", f"the weights can't be read: {reason}", where=where)


def _data_begin(part: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin, behind its local header (its extra field differs from the directory's)."""
    part.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<HH", part.read(4))
    return entry.header_offset + 30 + int(name) + int(extra)


def _info(path: Path, name: str, tensor: _Tensor, spans: Mapping[str, tuple[int, int]], prefix: str) -> TensorInfo:
    key, dtype = tensor.storage
    count, dense = 1, []
    for dim in reversed(tensor.shape):
        dense.append(count)
        count *= dim
    if f"{prefix}{key}" not in spans:
        raise _unreadable(Where(str(path)), f"the numbers of `{name}` are not in it, or compressed")
    strides = zip(tensor.shape, tensor.stride, reversed(dense), strict=True)
    if count > 1 and any(dim > 1 and found != wanted for dim, found, wanted in strides):
        raise _unreadable(Where(str(path)), f"`{name}` does not lie in one piece")
    size = DTYPE_BITS[dtype] // 8
    start, length = spans[f"{prefix}{key}"]
    begin = start + tensor.offset * size
    if tensor.offset < 0 or begin + count * size > start + length:
        raise _unreadable(Where(str(path)), f"`{name}` is larger than what is stored of it")
    return TensorInfo(name, dtype, tensor.shape, path, begin, begin + count * size, in_place=True)


@dataclass(frozen=True)
class _Tensor:
    storage: tuple[str, str]  # key and dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    return _Tensor(storage, int(offset), tuple(shape), tuple(stride))


class _Ignored:
    """Stands for state of a layer that is no weight."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Knows tensors, their storages and mappings; whatever else a pickle names is refused before it is looked up."""

    def __init__(self, file: io.BytesIO, where: Where) -> None:
        super().__init__(file)
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch.Size": tuple,
            "_io.BytesIO": _Ignored,
            "_codecs.encode": _Ignored,  # how old protocols write bytes
        }
        if f"{module}.{name}" in known:
            return known[f"{module}.{name}"]
        raise _unreadable(self._where, f"its pickle names `{module}.{name}`, which is no tensor")

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        _, dtype, key, *_ = pid
        if dtype not in DTYPE_BITS:
            raise _unreadable(self._where, f"a storage is of type {dtype!r}")
        return str(key), dtype


class _Part(io.RawIOBase):
    """A stretch of a file as a file."""

    def __init__(self, file: IO[bytes], offset: int, size: int) -> None:
        super().__init__()
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        self._file.seek(self._offset + self._at)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data
