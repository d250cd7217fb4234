"""Calibration tokens: windows from a file of ids (.npy) or of text, which the model's tokenizer reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specs.errors import SpecRTError, Where


def windows(
    path: Path, count: int, length: int, vocab: int | None, tokenizer: Path | None, seed: int = 0
) -> NDArray[np.int64]:
    """At most `count` windows [n, length] that do not overlap, spread over the file by `seed`, in the file's order.

    Raises SpecRTError PREC-013 for a file that holds no ids, ids that the model lacks, or less than one window.
    """
    ids = read_ids(path, tokenizer)
    if vocab is not None and ids.size and (int(ids.min()) < 0 or int(ids.max()) >= vocab):
        worst = int(ids.max()) if int(ids.max()) >= vocab else int(ids.min())
        raise _wrong(path, f"it holds the id {worst}, the model has {vocab}", "it may be of another tokenizer")
    whole = len(ids) // length
    if not whole:
        raise _wrong(path, f"it holds {len(ids)} tokens, a window takes {length}", "give more text")
    chosen = np.sort(np.random.default_rng(seed).permutation(whole)[:count])
    return np.stack([ids[start * length : (start + 1) * length] for start in chosen]).astype(np.int64)


def read_ids(path: Path, tokenizer: Path | None) -> NDArray[Any]:
    """All ids of a file, one after the other."""
    if not path.is_file():
        raise _wrong(path, "it does not exist", "name a .npy file of ids or a text file")
    if path.suffix == ".npy":
        try:
            ids = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise _wrong(path, f"it is no array of numpy: {error}", "write it with numpy.save") from error
        if not np.issubdtype(ids.dtype, np.integer):
            raise _wrong(path, f"it holds {ids.dtype}, not whole numbers", "token ids are whole numbers")
        return ids.reshape(-1)  # type: ignore[no-any-return]
    if tokenizer is None or not tokenizer.is_file():
        raise _wrong(path, "it is text, and the checkpoint has no tokenizer.json", "give token ids as a .npy file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _wrong(path, "it is neither .npy nor UTF-8 text", "name a .npy file of ids or a text file") from error
    from tokenizers import Tokenizer

    encoded: Sequence[int] = Tokenizer.from_file(str(tokenizer)).encode(text).ids
    return np.asarray(encoded, dtype=np.int64)


def digest(array: NDArray[Any]) -> str:
    """What tells one set of windows from another."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _wrong(path: Path, problem: str, hint: str) -> SpecRTError:
    return SpecRTError("PREC-013", f"can't calibrate on this file: {problem}", where=Where(str(path)), hint=hint)
