"""Checkpoint folders: what is read from headers, and every way a download can be broken."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from specs.checkpoint import Checkpoint, read_header
from specs.errors import SpecRTError
from tests.golden_errors import check_raises
from tests.specs.samples import CONFIG, SHAPES, safetensors, write_checkpoint

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def test_headers_are_read_and_weights_are_not(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path))
    assert checkpoint.config == CONFIG
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == SHAPES
    info = checkpoint.tensors["norm.weight"]
    data = info.file.read_bytes()[info.begin : info.end]
    assert struct.unpack("<8f", data) == tuple(range(8))


def test_the_header_reader_agrees_with_safetensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = {
        "bf16": torch.zeros(3, 5, dtype=torch.bfloat16), "f8": torch.zeros(7, dtype=torch.float8_e4m3fn),
        "flag": torch.zeros(3, dtype=torch.bool), "scalar": torch.tensor(1.0), "none": torch.zeros(0, 4),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_header(tmp_path / "x.safetensors")
    assert {name: info.shape for name, info in found.items()} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert {name: info.dtype for name, info in found.items()}["bf16"] == "BF16"


def shard(folder: Path, weight_map: dict[str, str], files: dict[str, list[str]]) -> Path:
    """A sharded checkpoint: the index says `weight_map`, the shards hold `files`."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, tensors in files.items():
        (folder / name).write_bytes(safetensors({tensor: SHAPES[tensor] for tensor in tensors}))
    return folder


ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MAP = {"embed.weight": ONE, "norm.weight": TWO, "head.weight": TWO}


def test_shards(tmp_path: Path) -> None:
    found = Checkpoint.open(shard(tmp_path, MAP, {ONE: ["embed.weight"], TWO: ["norm.weight", "head.weight"]}))
    assert {name: info.file.name for name, info in found.tensors.items()} == MAP


SHARDS: dict[str, tuple[dict[str, Any], dict[str, list[str]]]] = {
    "CKPT-007-missing-shard": (MAP, {ONE: ["embed.weight"]}),
    "CKPT-007-missing-tensor": (MAP, {ONE: ["embed.weight"], TWO: ["norm.weight"]}),
    "CKPT-007-unlisted-tensor": (
        MAP,
        {ONE: ["embed.weight", "layers.0.o.weight"], TWO: ["norm.weight", "head.weight"]},
    ),
    "CKPT-007-outside": ({"embed.weight": "../x.safetensors"}, {}),
    "CKPT-007-no-map": ({"embed.weight": 1}, {}),
}


@pytest.mark.parametrize("name", SHARDS)
def test_an_index_that_is_wrong(name: str, tmp_path: Path) -> None:
    check_raises(name, Checkpoint.open, shard(tmp_path, *SHARDS[name]))


def test_folders(tmp_path: Path) -> None:
    check_raises("CKPT-001-absent", Checkpoint.open, tmp_path / "absent")
    (tmp_path / "file").write_text("")
    check_raises("CKPT-001-file", Checkpoint.open, tmp_path / "file")
    folder = tmp_path / "model"
    folder.mkdir()
    check_raises("CKPT-002-empty-folder", Checkpoint.open, folder)
    (folder / "tokenizer.json").write_text("{}")
    check_raises("CKPT-002-no-config", Checkpoint.open, folder)
    (folder / "config.json").write_text("{}")
    check_raises("CKPT-002-no-weights", Checkpoint.open, folder)
    (folder / "pytorch_model.bin").write_text("")
    check_raises("CKPT-002-only-pickle", Checkpoint.open, folder)
    (folder / "model.safetensors").write_bytes(safetensors({}))
    (folder / "model.safetensors.index.json").write_text("{}")
    check_raises("CKPT-008-both", Checkpoint.open, folder)


def test_lfs_pointers(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").write_text(LFS)
    check_raises("CKPT-004-lfs-weights", Checkpoint.open, folder)
    (folder / "config.json").write_text(LFS)
    check_raises("CKPT-004-lfs-config", Checkpoint.open, folder)


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FILES: dict[str, bytes] = {
    "CKPT-005-truncated-data": header({"a": F32}, bytes(5)),
    "CKPT-005-truncated-header": header({"a": F32})[:20],
    "CKPT-005-no-header": b"abc",
    "CKPT-006-not-safetensors": b"PK\x03\x04 this is a zip file",
    "CKPT-006-not-json": struct.pack("<Q", 4) + b"\x80abc",
    "CKPT-006-not-an-object": struct.pack("<Q", 2) + b"[]",
    "CKPT-006-entry": header({"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "CKPT-006-inconsistent": header({"a": {**F32, "shape": [3]}}, bytes(8)),
    "CKPT-006-negative": header({"a": {**F32, "shape": [-1], "data_offsets": [4, 0]}}, bytes(8)),
    "CKPT-006-gap": header({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20)),
    "CKPT-006-overlap": header({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
    "CKPT-006-surplus": header({"a": F32}, bytes(12)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_weight_file_that_is_broken(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(FILES[name])
    check_raises(name, read_header, path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    whole = safetensors({"a": (3, 2), "b": (4,)})
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(SpecRTError) as caught:
            read_header(path)
        assert caught.value.code == "CKPT-005", size
