"""What executables of a device have in common: they say what their cache is, and give everything back once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from runtime.cache import Cached
from runtime.program import Program

if TYPE_CHECKING:
    from runtime.cuda.driver import Device


class OnDevice(Cached):
    """An executable whose memory, kernels and, where it has some, engines are on `_device`."""

    _device: Device
    _program: Program
    _places: Mapping[str, int]  # addresses of the caches by name

    @property
    def device(self) -> Device:
        """The GPU that it runs on."""
        return self._device

    @property
    def devices(self) -> list[Device]:
        """The same, as of executables that have several."""
        return [self._device]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Put copies of blocks of all caches into the stream; see runtime.executable.Executable."""
        cache = self._program.cache
        assert cache is not None  # who has blocks has a cache
        self._device.use()
        for layer in cache.layers:
            for name, width in ((layer.k, layer.dim), (layer.v, layer.value_dim)):
                size, start = cache.bytes_of(layer, width), self._places[name]
                for source, target in pairs:
                    self._device.copy(start + target * size, start + source * size, size)

    def close(self) -> None:
        """Give back engines, graphs and memory; nothing can be run afterwards."""
        device = getattr(self, "_device", None)
        if device is None:
            return
        device.use()
        device.wait()
        engines = getattr(self, "_engines", None)  # None also where loading them is what failed
        if engines is not None:
            engines.close()
        group = getattr(self, "_group", None)
        if group is not None:  # NCCL waits until all graphs are given up that it is in
            device.drop_graphs()
            group.close()
        device.close()
        self._device = None  # type: ignore[assignment]
