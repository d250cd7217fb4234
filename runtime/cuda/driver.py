"""The CUDA driver, as far as this runtime uses it: memory, one stream, copies, kernels, graphs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cuda.bindings import driver as cu

from runtime.cuda.missing import cuda_failed
from runtime.executable import Array


def check(result: tuple[Any, ...]) -> Any:
    """What a driver call gives behind its status. Raises SpecRTError RUN-041 where the status is not success."""
    status, *values = result
    if status != cu.CUresult.CUDA_SUCCESS:
        name, text = (found[1].decode() for found in (cu.cuGetErrorName(status), cu.cuGetErrorString(status)))
        raise cuda_failed(name, text)
    return values[0] if len(values) == 1 else values


def count() -> int:
    """How many GPUs this process sees; 0 where CUDA sees none. Raises SpecRTError RUN-041 for other errors."""
    if cu.cuInit(0)[0] == cu.CUresult.CUDA_ERROR_NO_DEVICE:
        return 0
    return int(check(cu.cuDeviceGetCount()))


PIECE = 2 << 20  # bytes: what smaller allocations share, and a handle is of all of it
OVERLAP = 90  # the first architecture whose launches can overlap


def _overlapping(stream: Any) -> Any:
    """How kernels are launched; of its attributes, the one that lets a kernel begin early, `numAttrs` are used."""
    attribute = cu.CUlaunchAttribute()
    attribute.id = cu.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    made = cu.CUlaunchConfig()
    made.blockDimY = made.blockDimZ = 1
    made.hStream, made.attrs = stream, [attribute]
    return made


class Device:
    """One GPU with a stream of its own; remembers what it allocated and gives all of it back in `close`."""

    def __init__(self, ordinal: int = 0) -> None:
        """Raises SpecRTError RUN-041 where there is no such GPU."""
        check(cu.cuInit(0))
        self.ordinal = ordinal
        self._device = check(cu.cuDeviceGet(ordinal))
        self._context = check(cu.cuDevicePrimaryCtxRetain(self._device))
        check(cu.cuCtxSetCurrent(self._context))
        self.name: str = check(cu.cuDeviceGetName(128, self._device)).split(b"\0")[0].decode()
        kinds = cu.CUdevice_attribute
        self.capability = 10 * self._attribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) + self._attribute(
            kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
        )
        self.multiprocessors = self._attribute(kinds.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        self.stream = check(cu.cuStreamCreate(cu.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self._launch = _overlapping(self.stream)
        self.overlaps = self.capability >= OVERLAP
        self.overlap = False  # whether kernels that can wait are launched so that they begin early
        self._memory: list[int] = []
        self._pinned: list[int] = []
        self._opened: list[int] = []
        self._modules: dict[Path, Any] = {}
        self._graphs: list[Any] = []
        self._signals: list[Any] = []

    def _attribute(self, kind: Any) -> int:
        return int(check(cu.cuDeviceGetAttribute(kind, self._device)))

    def use(self) -> None:
        """Make this GPU the calling thread's."""
        check(cu.cuCtxSetCurrent(self._context))

    @property
    def free_memory(self) -> int:
        """Bytes that can be allocated now."""
        self.use()
        return int(check(cu.cuMemGetInfo())[0])

    @property
    def used_memory(self) -> int:
        """Bytes that this and all other processes hold on the GPU."""
        self.use()
        free, total = check(cu.cuMemGetInfo())
        return int(total) - int(free)

    # -- memory ---------------------------------------------------------------------------------------------------

    def allocate(self, size: int) -> int:
        """Device memory of at least `size` bytes; gives its address."""
        address = int(check(cu.cuMemAlloc(max(size, 256))))
        self._memory.append(address)
        return address

    def pinned(self, size: int) -> Array:
        """Host memory u8[size] that copies reach without a detour."""
        address = int(check(cu.cuMemAllocHost(max(size, 1))))
        self._pinned.append(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def fill(self, address: int, bits: int, size: int, count: int) -> None:
        """Write `count` times the same element of `size` bytes, given by its bits."""
        write = {1: cu.cuMemsetD8Async, 2: cu.cuMemsetD16Async, 4: cu.cuMemsetD32Async}[size]
        check(write(address, bits, count, self.stream))

    def upload(self, target: int, source: Array, size: int | None = None) -> None:
        """Copy the bytes of a host array to the device, in the order of the stream."""
        count = source.nbytes if size is None else size
        check(cu.cuMemcpyHtoDAsync(target, source.ctypes.data, count, self.stream))

    def download(self, target: Array, source: int) -> None:
        """Copy from the device into a host array, in the order of the stream."""
        check(cu.cuMemcpyDtoHAsync(target.ctypes.data, source, target.nbytes, self.stream))

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy so many bytes from one place of the device to another, in the order of the stream."""
        check(cu.cuMemcpyDtoDAsync(target, source, size, self.stream))

    def copy_rows(self, target: int, pitch: int, source: int, width: int, rows: int) -> None:
        """Copy rows of `width` bytes that lie one after the other to places that are `pitch` bytes apart."""
        one = cu.CUDA_MEMCPY2D()
        one.srcMemoryType = one.dstMemoryType = cu.CUmemorytype.CU_MEMORYTYPE_DEVICE
        one.srcDevice, one.dstDevice, one.srcPitch, one.dstPitch = source, target, width, pitch
        one.WidthInBytes, one.Height = width, rows
        check(cu.cuMemcpy2DAsync(one, self.stream))

    def wait(self) -> None:
        """Until everything in the stream is done."""
        check(cu.cuStreamSynchronize(self.stream))

    def event(self) -> Any:
        """A point in the stream, to wait for or to measure from."""
        made = check(cu.cuEventCreate(cu.CUevent_flags.CU_EVENT_DEFAULT))
        check(cu.cuEventRecord(made, self.stream))
        return made

    def passed(self, event: Any) -> None:
        """Wait for an event, and give it up."""
        check(cu.cuEventSynchronize(event))
        check(cu.cuEventDestroy(event))

    def signal(self) -> Any:
        """An event that is used again and again, by `mark`; until then it has passed."""
        self.use()
        made = check(cu.cuEventCreate(cu.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        self._signals.append(made)
        return made

    def mark(self, signal: Any) -> None:
        """Make this point of the stream the one that a signal means from now on."""
        check(cu.cuEventRecord(signal, self.stream))

    def follow(self, signal: Any) -> None:
        """Let what comes in the stream wait for a point of a stream, which may be another GPU's."""
        check(cu.cuStreamWaitEvent(self.stream, signal, 0))

    def reach(self, other: Device) -> None:
        """Let copies to another GPU go there directly, where the machine has a way for that."""
        if int(check(cu.cuDeviceCanAccessPeer(self._device, other._device))):
            self.use()
            status = cu.cuCtxEnablePeerAccess(other._context, 0)
            if status[0] != cu.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED:
                check(status)

    def push(self, other: Device, target: int, source: int, size: int) -> None:
        """Copy so many bytes to a place on another GPU, in the order of this one's stream."""
        check(cu.cuMemcpyPeerAsync(target, other._context, source, self._context, size, self.stream))

    def milliseconds(self, start: Any, stop: Any) -> float:
        """Time between two events, after the second has passed; both are given up."""
        check(cu.cuEventSynchronize(stop))
        elapsed = float(check(cu.cuEventElapsedTime(start, stop)))
        for event in (start, stop):
            check(cu.cuEventDestroy(event))
        return elapsed

    def write(self, target: int, source: Array) -> None:
        """Copy to the device at once, from any thread, also where what is in the stream waits for it."""
        self.use()
        stream = check(cu.cuStreamCreate(cu.CUstream_flags.CU_STREAM_NON_BLOCKING))
        check(cu.cuMemcpyHtoDAsync(target, source.ctypes.data, source.nbytes, stream))
        check(cu.cuStreamSynchronize(stream))
        check(cu.cuStreamDestroy(stream))

    # -- memory of other processes ----------------------------------------------------------------------------------

    def reaches(self, ordinal: int) -> bool:
        """Whether kernels here can use the memory of a GPU."""
        other = check(cu.cuDeviceGet(ordinal))
        return ordinal == self.ordinal or bool(check(cu.cuDeviceCanAccessPeer(self._device, other)))

    def share(self, size: int) -> tuple[int, bytes]:
        """Device memory that other processes may use too: its address here, and what they open it by."""
        address = self.allocate(-(-size // PIECE) * PIECE)
        return address, bytes(check(cu.cuIpcGetMemHandle(address)).reserved)

    def open(self, handle: bytes) -> int:
        """The address here of memory that another process shares, until `close`."""
        given = cu.CUipcMemHandle()
        given.reserved = handle
        flags = cu.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        address = int(check(cu.cuIpcOpenMemHandle(given, flags)))
        self._opened.append(address)
        return address

    # -- kernels and graphs ---------------------------------------------------------------------------------------

    def function(self, file: Path, entry: str, shared: int) -> Any:
        """A kernel of a cubin, with the shared memory that it asks for."""
        if file not in self._modules:
            self._modules[file] = check(cu.cuModuleLoadData(file.read_bytes()))
        function = check(cu.cuModuleGetFunction(self._modules[file], entry.encode()))
        if shared > 48 * 1024:  # more must be asked for
            kind = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(cu.cuFuncSetAttribute(function, kind, shared))
        return function

    def launch(
        self, function: Any, grid: Sequence[int], threads: int, shared: int, arguments: Sequence[int], overlap: bool
    ) -> None:
        """Start a kernel whose arguments are addresses.

        One that waits itself, in every block, has `overlap`: it may begin before the kernel in front of it ends.
        """
        count = len(arguments)
        values = (ctypes.c_void_p * count)(*arguments)
        base = ctypes.addressof(values)
        places = (ctypes.c_void_p * count)(*range(base, base + 8 * count, 8))
        launch = self._launch
        launch.gridDimX, launch.gridDimY, launch.gridDimZ = grid
        launch.blockDimX, launch.sharedMemBytes, launch.numAttrs = threads, shared, int(overlap and self.overlap)
        check(cu.cuLaunchKernelEx(launch, function, ctypes.addressof(places), 0))

    def resident(self, function: Any, threads: int, shared: int) -> int:
        """How many blocks of a kernel run at once."""
        each = check(cu.cuOccupancyMaxActiveBlocksPerMultiprocessor(function, threads, shared))
        return int(each) * self.multiprocessors

    def capture(self, work: Callable[[], None]) -> Any:
        """A graph of what `work` puts into the stream; `work` must not wait for it."""
        check(cu.cuStreamBeginCapture(self.stream, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
        try:
            work()
        finally:
            graph = check(cu.cuStreamEndCapture(self.stream))
        made = check(cu.cuGraphInstantiate(graph, 0))
        check(cu.cuGraphDestroy(graph))
        self._graphs.append(made)
        return made

    def drop(self, graph: Any) -> None:
        """Give up a graph, once it has run."""
        self.wait()
        self._graphs.remove(graph)
        check(cu.cuGraphExecDestroy(graph))

    def replay(self, graph: Any) -> None:
        """Start a graph."""
        check(cu.cuGraphLaunch(graph, self.stream))

    def drop_graphs(self) -> None:
        """Wait, then give up every graph."""
        self.use()
        self.wait()
        for graph in self._graphs:
            check(cu.cuGraphExecDestroy(graph))
        self._graphs = []

    def close(self) -> None:
        """Wait, then give back graphs, modules, memory, stream and the hold on the GPU."""
        if self._context is None:
            return
        self.drop_graphs()
        for signal in self._signals:
            check(cu.cuEventDestroy(signal))
        for module in self._modules.values():
            check(cu.cuModuleUnload(module))
        for address in self._opened:
            check(cu.cuIpcCloseMemHandle(address))
        for address in self._memory:
            check(cu.cuMemFree(address))
        for address in self._pinned:
            check(cu.cuMemFreeHost(address))
        check(cu.cuStreamDestroy(self.stream))
        check(cu.cuDevicePrimaryCtxRelease(self._device))
        self._modules, self._memory, self._pinned, self._context = {}, [], [], None
        self._opened, self._signals = [], []
