"""The storage of a tensor on the pretend device: that of its values, emptied and filled as on CUDA."""

from typing import Any

import torch

from emloc.testing.traffic import Traffic

DEVICE = torch.device("cuda:0")


class DeviceStorage:
    """The result of `untyped_storage()`: bytes on the device."""

    def __init__(self, values: torch.UntypedStorage, traffic: Traffic) -> None:
        self._values, self._traffic = values, traffic
        self._cdata = values._cdata  # pyright: ignore[reportPrivateUsage]
        self.device = DEVICE

    def nbytes(self) -> int:
        """The number of bytes."""
        return self._values.nbytes()

    size = nbytes

    def data_ptr(self) -> int:
        """The address, by which storages are told apart."""
        return self._values.data_ptr()

    def resizable(self) -> bool:
        """Return whether `resize_` is possible."""
        return self._values.resizable()

    def resize_(self, size: int) -> "DeviceStorage":
        """Let go of the bytes or have as many as `size`, of no particular content."""
        self._traffic.resize(self._values, size)
        return self

    def copy_(self, source: Any, non_blocking: bool = False) -> "DeviceStorage":
        """Fill it from the host or from the device."""
        if isinstance(source, DeviceStorage):
            self._values.copy_(source._values)
        else:
            self._values.copy_(source)
            self._traffic.to_device.add(source.nbytes())
        return self

    def cpu(self) -> torch.UntypedStorage:
        """A copy on the host."""
        self._traffic.to_host.add(self.nbytes())
        return self._values.clone()
