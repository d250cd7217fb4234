"""What executables of a device have in common: they say what their cache is, and give everything back once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.cache import Cached

if TYPE_CHECKING:
    from runtime.cuda.driver import Device


class OnDevice(Cached):
    """An executable whose memory, kernels and, where it has some, engines are on `_device`."""

    _device: Device

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
        device.close()
        self._device = None  # type: ignore[assignment]
