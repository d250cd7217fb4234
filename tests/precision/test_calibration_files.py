"""Files of calibration tokens: windows of ids or text, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compiler.quantization.tokens import windows
from tests.golden_errors import check_raises
from tests.precision.models import ROOT

TOKENIZER = ROOT / "demo" / "tiny-llama" / "tokenizer.json"


def test_windows_do_not_overlap_and_follow_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(1000, dtype=np.uint16))
    first = windows(path, 4, 100, 1000, None, seed=1)
    assert first.shape == (4, 100)
    assert (np.diff(first[:, 0]) >= 100).all()
    assert (first == windows(path, 4, 100, 1000, None, seed=1)).all()
    assert (first != windows(path, 4, 100, 1000, None, seed=2)).any()
    assert windows(path, 99, 100, 1000, None).shape == (10, 100)


def test_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("In the beginning. " * 40, encoding="utf-8")
    assert windows(path, 2, 16, 4096, TOKENIZER).shape == (2, 16)


def test_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    ids, floats, text = tmp_path / "ids.npy", tmp_path / "floats.npy", tmp_path / "text.txt"
    np.save(ids, np.arange(50))
    np.save(floats, np.ones(50))
    text.write_bytes(b"\xff\xfe\x00")
    check_raises("PREC-013", windows, ids, 1, 64, 100, None)
    check_raises("PREC-013-vocab", windows, ids, 1, 16, 40, None)
    check_raises("PREC-013-type", windows, floats, 1, 16, 40, None)
    check_raises("PREC-013-text", windows, text, 1, 16, 40, TOKENIZER)
    check_raises("PREC-013-tokenizer", windows, text, 1, 16, 40, None)
    check_raises("PREC-013-missing", windows, tmp_path / "no.npy", 1, 16, 40, None)
