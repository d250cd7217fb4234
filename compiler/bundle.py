"""Writes a bundle: a directory that appears whole or not at all.

Everything is written into a hidden directory beside the target, `bundle.json` with sizes and hashes last, and renamed
into place when complete. A compile that is killed leaves only the hidden directory, which never loads and which the
next compile removes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specs.errors import SpecRTError

FORMAT = 1
MANIFEST = "bundle.json"


@contextmanager
def new_bundle(out: Path) -> Iterator[Path]:
    """A directory to fill; it becomes `out` when the block ends well, and vanishes when it does not.

    Raises SpecRTError BUNDLE-010 where `out` holds something that is no bundle, BUNDLE-011 where it can't be written,
    BUNDLE-012 where the disk is full.
    """
    out = Path(os.path.abspath(out))
    _check_target(out)
    work = out.parent / f".{out.name}.{os.getpid()}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        work.mkdir()
    except OSError as error:
        raise _write_error(out, error) from error
    try:
        yield work
        if not (work / MANIFEST).is_file():
            raise AssertionError("a bundle without its manifest")
        _replace(work, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise _write_error(out, error) from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_manifest(work: Path, content: Mapping[str, Any]) -> None:
    """Write `bundle.json` with the size and SHA-256 of every other file; call it last."""
    files = {
        path.relative_to(work).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(work.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"format": FORMAT, **content, "files": files}, indent=1, sort_keys=False)
    with open(work / MANIFEST, "w", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _check_target(out: Path) -> None:
    if not out.exists() or (out / MANIFEST).is_file():
        return
    if out.is_dir() and not any(out.iterdir()):
        return
    what = "a directory that is no bundle" if out.is_dir() else "a file"
    raise SpecRTError("BUNDLE-010", f"`{out}` is {what}", hint="give another `--out`, or remove it")


def _remove_stale(out: Path) -> None:
    """Remove what compiles killed earlier left beside `out`; those still running keep theirs."""
    for path in out.parent.glob(f".{out.name}.*.partial"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _replace(work: Path, out: Path) -> None:
    if out.exists():
        old = out.parent / f".{out.name}.{os.getpid()}.old.partial"
        os.rename(out, old)
        os.rename(work, out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(work, out)


def _write_error(out: Path, error: OSError) -> SpecRTError:
    place = error.filename or str(out)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(_existing(out)).free
        return SpecRTError(
            "BUNDLE-012", f"no space left to write `{out}` ({free / 1e6:.0f} MB free)",
            hint="free some space or give an `--out` on another disk; nothing was left behind",
        )  # fmt: skip
    reason = f"{error.strerror} ({place})"
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        reason = f"`{place}` is no folder"
    return SpecRTError("BUNDLE-011", f"can't write `{out}`: {reason}", hint="give an `--out` that you may write to")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
