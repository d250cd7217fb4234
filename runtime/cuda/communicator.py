"""What ranks hand to each other on the device, put into the stream: by NCCL, or whatever has the same functions."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, Protocol

from runtime.cuda.missing import nccl_failed, no_nccl

if TYPE_CHECKING:
    from runtime.cuda.driver import Device

_LOG = logging.getLogger("runtime.nccl")
LIBRARY = "libnccl.so.2"
# nccl.h: ncclDataType_t, ncclRedOp_t
_TYPES = {"i8": 0, "u8": 1, "i32": 2, "f16": 6, "f32": 7, "bf16": 9}
_OPERATIONS = {"sum": 0, "max": 2, "min": 3}


class Communicator(Protocol):
    """Some ranks, of which this is number `rank` of `size`; all of them call the same functions in the same order.

    Everything is put into the stream and can be captured in a graph; counts are of elements, places are addresses.
    """

    rank: int
    size: int

    def all_reduce(self, source: int, target: int, count: int, dtype: str, operation: str = "sum") -> None:
        """The `sum`, `min` or `max` of all ranks' elements, the same bits on each; source and target may be one."""

    def all_gather(self, source: int, target: int, count: int, dtype: str) -> None:
        """The `count` elements of each rank, in the order of ranks."""

    def abort(self) -> None:
        """From any thread: let what waits in the stream for other ranks go on, with any result; nothing works after."""

    def close(self) -> None:
        """Give it up, once the stream has nothing of it and its graphs are given up."""


class _Id(ctypes.Structure):
    """What ranks recognize each other by: ncclUniqueId."""

    _fields_ = (("bytes", ctypes.c_uint8 * 128),)


class _Library:
    """NCCL's C functions; each call is checked. Raises SpecRTError RUN-045 where there is no NCCL."""

    def __init__(self) -> None:
        self._library = _open()
        for name in ("ncclGetErrorString", "ncclGetLastError"):
            getattr(self._library, name).restype = ctypes.c_char_p
        self._library.ncclGetLastError.argtypes = [ctypes.c_void_p]
        version = ctypes.c_int()
        self("ncclGetVersion", ctypes.byref(version))
        self.version = version.value

    def __call__(self, name: str, *arguments: Any) -> None:
        """Raises SpecRTError RUN-046 where a call fails."""
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            text = self._library.ncclGetErrorString(status).decode()
            raise nccl_failed(name, text, (self._library.ncclGetLastError(None) or b"").decode())


def _open() -> ctypes.CDLL:
    """The library of the package from PyPI, which fits the environment, else the system's."""
    found = importlib.util.find_spec("nvidia")
    folders = [] if found is None else list(found.submodule_search_locations or ())
    paths = [path for folder in folders if (path := Path(folder) / "nccl" / "lib" / LIBRARY).is_file()]
    try:
        return ctypes.CDLL(str(paths[0]) if paths else LIBRARY)
    except OSError as error:
        raise no_nccl(str(error)) from error


def new_id() -> bytes:
    """An id for one communicator, to be given to all its ranks. Raises SpecRTError RUN-045, RUN-046."""
    made = _Id()
    _Library()("ncclGetUniqueId", ctypes.byref(made))
    return bytes(made)


class NCCL:
    """NVIDIA's library of collectives, over NVLink, PCIe or the host's memory, as it finds."""

    def __init__(self, device: Device, key: bytes, rank: int, size: int) -> None:
        """Wait for all other ranks of a key. Raises SpecRTError RUN-045, RUN-046."""
        self.rank, self.size, self._device = rank, size, device
        self._call = _Library()
        self._stream = ctypes.c_void_p(int(device.stream))
        self._lock = Lock()  # an abort comes from another thread
        self._aborting: Thread | None = None
        handle = ctypes.c_void_p()
        device.use()
        self._call(
            "ncclCommInitRank", ctypes.byref(handle), ctypes.c_int(size), _Id.from_buffer_copy(key), ctypes.c_int(rank)
        )
        self._handle: ctypes.c_void_p | None = handle
        _LOG.info("rank %d of %d on %s: NCCL %d", rank, size, device.name, self._call.version)

    def all_reduce(self, source: int, target: int, count: int, dtype: str, operation: str = "sum") -> None:
        """See Communicator."""
        self._put("ncclAllReduce", source, target, count, dtype, ctypes.c_int(_OPERATIONS[operation]))

    def all_gather(self, source: int, target: int, count: int, dtype: str) -> None:
        """See Communicator."""
        self._put("ncclAllGather", source, target, count, dtype)

    def _put(self, name: str, source: int, target: int, count: int, dtype: str, *more: ctypes.c_int) -> None:
        places = ctypes.c_void_p(source), ctypes.c_void_p(target)
        with self._lock:
            if self._handle is None:
                raise nccl_failed(name, "the communicator was aborted", "")
            self._call(
                name, *places, ctypes.c_size_t(count), ctypes.c_int(_TYPES[dtype]), *more, self._handle, self._stream
            )

    def abort(self) -> None:
        """See Communicator; it returns at once, since NCCL waits until graphs of the communicator are given up."""
        with self._lock:
            handle, self._handle = self._handle, None
        if handle is not None:
            self._aborting = Thread(target=self._call, args=("ncclCommAbort", handle), daemon=True)
            self._aborting.start()

    def close(self) -> None:
        """See Communicator."""
        with self._lock:
            handle, self._handle = self._handle, None
        if handle is not None:
            self._call("ncclCommDestroy", handle)
        elif self._aborting is not None:
            self._aborting.join(timeout=10)
