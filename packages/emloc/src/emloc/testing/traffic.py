"""Counts of what passes between host and device, and of what lives on the device.

Bytes are those of tensors' storages, each counted once however many views it has, from the operation that
makes it until its last view is gone. CUDA's allocator rounds each up to 512 bytes and keeps freed ones;
neither is imitated. The workspace inside an operation is not seen.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Transfers:
    """Copies in one direction.

    Attributes:
        count: copies made.
        bytes: their sizes in sum.
    """

    count: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        """Count one copy of so many bytes."""
        self.count += 1
        self.bytes += size


@dataclass
class Traffic:
    """The counts of one pretend device.

    Attributes:
        to_device: copies from the host.
        to_host: copies from the device, scalars that were read left out.
        unpinned: `non_blocking` copies from memory that is not pinned, which block all the same.
        unfinished: operations of the host on what a `non_blocking` copy from the device wrote, whose values
            are there only after a synchronisation. Copies back to the device keep the order and do not count.
        reads: scalars read (`item`, `float`, `bool`, …), each of which waits for the device.
        waits: other operations that wait for it, since the shape of their result depends on values.
        live_bytes: held by tensors on the device now.
        peak_bytes: the most since the start or since `reset_peak`.
        limit: bytes that may live; an operation that makes more raises `torch.OutOfMemoryError`.
    """

    to_device: Transfers = field(default_factory=Transfers)
    to_host: Transfers = field(default_factory=Transfers)
    unpinned: int = 0
    unfinished: int = 0
    reads: int = 0
    waits: int = 0
    live_bytes: int = 0
    peak_bytes: int = 0
    limit: int | None = None
    _storages: dict[int, int] = field(default_factory=dict[int, int])
    _pinned: set[int] = field(default_factory=set[int])
    _arriving: set[int] = field(default_factory=set[int])

    def reset_peak(self) -> None:
        """Let the peak begin at what lives now."""
        self.peak_bytes = self.live_bytes

    def hold(self, tensor: Tensor) -> None:
        """Count a host tensor's storage as one of the device, until it is freed.

        Raises:
            torch.OutOfMemoryError: more than `limit` bytes would live.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        if key not in self._storages:
            self._allocate(key, storage.nbytes())
            weakref.finalize(storage, self._free, key)

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """Give a storage of the device another size.

        Raises:
            torch.OutOfMemoryError: more than `limit` bytes would live.
        """
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        self._free(key)
        self._allocate(key, size)
        storage.resize_(size)

    def _allocate(self, key: int, size: int) -> None:
        if self.limit is not None and self.live_bytes + size > self.limit:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size} bytes on a pretend device that holds "
                f"{self.live_bytes} of {self.limit} bytes."
            )
        self._storages[key] = size
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _free(self, key: int) -> None:
        self.live_bytes -= self._storages.pop(key, 0)

    def pin(self, tensor: Tensor) -> None:
        """Let a host tensor's storage count as pinned."""
        storage = tensor.untyped_storage()
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        self._pinned.add(key)
        weakref.finalize(storage, self._pinned.discard, key)

    def is_pinned(self, tensor: Tensor) -> bool:
        """Return whether a host tensor's storage was pinned."""
        return tensor.untyped_storage()._cdata in self._pinned  # pyright: ignore[reportPrivateUsage]

    def arrives(self, tensor: Tensor) -> None:
        """Note that a host tensor's values are on their way."""
        storage = tensor.untyped_storage()
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        self._arriving.add(key)
        weakref.finalize(storage, self._arriving.discard, key)

    def read_on_host(self, tensors: Iterable[Tensor]) -> None:
        """Count an operation of the host that reads these."""
        if self._arriving:
            keys = {t.untyped_storage()._cdata for t in tensors}  # pyright: ignore[reportPrivateUsage]
            self.unfinished += not keys.isdisjoint(self._arriving)

    def synchronize(self) -> None:
        """Let all copies be done."""
        self._arriving.clear()
