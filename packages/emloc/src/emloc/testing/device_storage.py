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
        """Fill it from the host or from the device, by an operation on tensors, as torch does."""
        ours = isinstance(source, DeviceStorage)
        self.as_tensor().copy_(source.as_tensor() if ours else _bytes(source))
        return self

    def cpu(self) -> torch.UntypedStorage:
        """A copy on the host, by an operation on tensors, as torch makes it."""
        copied = torch.empty(self.nbytes(), dtype=torch.uint8)
        copied.copy_(self.as_tensor())
        return copied.untyped_storage()

    def as_tensor(self) -> Any:
        """All bytes, as numbers of 8 bits on the device."""
        from emloc.testing.device_tensor import DeviceTensor  # which knows this class

        return DeviceTensor(_bytes(self._values), self._traffic)


def _bytes(storage: torch.UntypedStorage) -> Any:
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # pyright: ignore[reportArgumentType]
